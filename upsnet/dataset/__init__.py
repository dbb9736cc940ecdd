"""Reading panoptic data sets, transforms, batches, and the synthetic `shapes` set."""
