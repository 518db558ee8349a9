"""Synthetic tasks: questions whose difficulty is a known number of steps.

question: what a task offers. One file for each task. documents: the table of tasks, and texts of
questions by number, which data/sources.py reads.
"""
