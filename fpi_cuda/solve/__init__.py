"""A solve: what it is (problem), in which direction, by whom (route), and its autograd node."""
