"""Optical flow: files of pairs of photographs, a generator of them, and flow shown in colour."""
