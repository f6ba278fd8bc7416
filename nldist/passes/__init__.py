"""What a method is made of: passes over a plan, what they are given, and the method's contract."""
