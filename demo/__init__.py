"""`python -m demo`: a real teacher, a student made from its layers, real text, honest numbers, in a few minutes."""
