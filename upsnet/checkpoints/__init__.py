"""Reading weight files safely, and other people's names for our layers."""
