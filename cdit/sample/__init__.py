"""What sample.py does: futures of a dataset's contexts or of an image, as videos and pictures."""
