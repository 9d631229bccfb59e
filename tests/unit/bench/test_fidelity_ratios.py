"""What a real run and its simulation are compared in."""

from layerkv.bench import fidelity


def test_a_figure_that_one_of_the_two_does_not_know_has_no_ratio() -> None:
    each = {"mean": 2.0, "p99": 4.0}
    known = {"ttft_s": each, "output_tokens_per_s": 8.0, "fluid": 0.5, "tokens_on_time": 0.8, "lag_s": each}
    silent = {"ttft_s": each, "output_tokens_per_s": 4.0}
    row = {"policy": "stock", "rate_per_s": 1.0, "seed": 0, "real": known, "simulated": silent}
    (merged,) = fidelity._over_seeds([row])
    ratios = merged["simulated_over_real"]
    assert (ratios["fluid"], ratios["lag_s.p99"]) == (None, None)
    assert (ratios["ttft_s.mean"], ratios["output_tokens_per_s"]) == (1.0, 0.5)
    (merged,) = fidelity._over_seeds([{**row, "simulated": {**known, "lag_s": None}}])
    assert (merged["simulated_over_real"]["fluid"], merged["simulated_over_real"]["lag_s.mean"]) == (1.0, None)
