"""What is subtracted from photos before a network sees them."""

PIXEL_MEANS = (102.9801, 115.9465, 122.7717)
"""Channel means of the caffe networks, B, G, R in 0..255."""
