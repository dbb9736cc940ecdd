"""Scores: panoptic quality and where it is lost, instance AP, semantic IoU, and the files that hold the results."""
