"""Merge methods: plain functions over torch tensors in small files by family, and the one table of them."""

from dodgeburn.merge.methods.table import METHODS, Method, Param, find_method, merge_tensors

__all__ = ["METHODS", "Method", "Param", "find_method", "merge_tensors"]
