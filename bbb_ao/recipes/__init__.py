"""Recipes: stages of training, calibration data, block-wise and end-to-end training, evaluation."""
