"""Raw disk images in files and on block devices."""
