"""The batched augmentation ops that `nldist.data.views` puts together."""
