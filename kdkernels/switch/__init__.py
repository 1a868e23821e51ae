"""SWITCH: sequences that a student writes and its teacher corrects where the two disagree (arXiv 2410.19503)."""
