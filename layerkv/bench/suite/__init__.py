"""The TTFT benchmark suite: the same open-loop load through several real servers, side by side."""
