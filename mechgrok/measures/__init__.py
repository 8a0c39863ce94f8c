"""Functions of one model. They know no step and no stage."""
