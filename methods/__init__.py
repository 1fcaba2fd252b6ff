"""Methods: losses, mixup, what one step computes, and what the loss does to the classifier's rows."""

from methods.method import Method, MethodOutput, build_method, check_names

__all__ = ["Method", "MethodOutput", "build_method", "check_names"]
