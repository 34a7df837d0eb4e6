"""Scores of pictures: features of a judge, distances between sets of them, and studies made of such."""
