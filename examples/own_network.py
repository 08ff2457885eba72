"""A network of your own: python train.py --net examples/own_network.py:network"""
import torch.nn as nn


def network(shape, classes):
    """An nn.Sequential for images of a shape (C, H, W); see relaxations.AFFINE for its layers."""
    channels, height, width = shape
    neurons = 8 * (height // 2) * (width // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(neurons, 40), nn.BatchNorm1d(40), nn.ReLU(),
        nn.Linear(40, classes))
