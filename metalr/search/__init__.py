"""Hyperparameter search for one task: grid, random, TPE and ASHA, their trials, and minibatch training."""
