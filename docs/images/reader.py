"""Draws reader.svg: what a reader's clock makes of one stream of tokens. `python docs/images/reader.py`."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from layerkv.config import SloClass
from layerkv.figures import ReaderClock, due_s

SLO = SloClass(name="chat", ttft_s=2.0, tpot_s=0.2)
# A first token in time, twelve at once, a pause, and the rest faster than anybody reads.
TOKENS_S = [1.2, *(1.3 + 0.05 * k for k in range(12)), *(5.4 + 0.05 * k for k in range(22))]


def main() -> None:
    """Writes reader.svg beside this file."""
    mpl.rcParams.update({"svg.hashsalt": "layerkv", "svg.fonttype": "none"})
    reader = ReaderClock(SLO.pace_s)
    read_s = []
    pauses = []
    for at_s in TOKENS_S:
        wanted_s = reader.wants_next_s if reader.num_tokens else at_s
        if reader.add(at_s) > 0.05:
            pauses.append((wanted_s, at_s))
        read_s.append(reader.wants_next_s - SLO.pace_s)
    counts = range(1, len(TOKENS_S) + 1)
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for start_s, end_s in pauses:
        axis.axvspan(start_s, end_s, color="#a58bd8", alpha=0.35, linewidth=0)
        text = f"pause: {end_s - start_s:.1f} s,\nthe reader has read all"
        axis.annotate(text, ((start_s + end_s) / 2, 3), ha="center", va="bottom", fontsize=9)
    axis.step([TOKENS_S[0], *TOKENS_S], [0, *counts], where="post", color="#0072B2", linewidth=2, label="delivered")
    read = {"where": "post", "color": "#009E73", "linewidth": 1.6}
    axis.step(read_s, counts, **read, label="read: one token each TPOT, from the first one on")
    due = [due_s(SLO, 0.0, k) for k in range(len(TOKENS_S))]
    axis.plot([due[0], *due], [0, *counts], color="#444444", linewidth=1, linestyle=(0, (4, 3)), label="due")
    axis.annotate("buffer", (2.6, 10.4), ha="center", fontsize=9, color="#0072B2")
    axis.annotate("arrival + TTFT", (SLO.ttft_s, 0.3), xytext=(4, 2), textcoords="offset points", fontsize=9)
    axis.set(xlim=(0, 9.5), ylim=(0, len(TOKENS_S) + 1), xlabel="seconds after the request arrived", ylabel="tokens")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left")
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
