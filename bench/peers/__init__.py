"""Other K-FAC libraries, made to train the same steps."""
