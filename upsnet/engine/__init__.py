"""Training and test loops for any network that keeps the house's interface; they know neither recipe nor system.

* training mode: `network(batch)` returns a `TrainingOutput` of named losses,
* evaluation mode: `network(batch)` returns one `Prediction` for each image.
"""
