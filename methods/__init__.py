"""Losses, mixup, the mathematics of a training step, and measures of its effect on classifier and features."""

from methods.method import Method, MethodOutput, build_method, check_names

__all__ = ["Method", "MethodOutput", "build_method", "check_names"]
