"""What people look at, from run directories alone."""
