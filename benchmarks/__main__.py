from __future__ import annotations

import argparse

from . import suites


def main():
    p = argparse.ArgumentParser()
    p.add_argument("suite")
    p.add_argument("--sizes", nargs="*")
    p.add_argument("--families", nargs="*", default=())
    p.add_argument("--budget", type=float, default=2.0)
    p.add_argument("--kinds", nargs="*", default=["easy", "hard"])
    a = p.parse_args()
    sizes = tuple(tuple(map(int, s.split("x"))) for s in a.sizes) if a.sizes else suites.problems.SIZES
    rows = suites.solve(suites.Options(sizes=sizes, families=tuple(a.families), budget=a.budget, slow_start=False), a.kinds)
    for r in rows:
        if "skipped" in r: continue
        print(f"{r['problem']:5}{r['batch']:5}x{r['size']:<5}{r['mode']:17}{r['family'][:6]+' '+r['method']:34}{r.get('median_s',float('nan'))*1e3:9.2f} ms [{r.get('q1_s',0)*1e3:.2f}-{r.get('q3_s',0)*1e3:.2f}] n={r.get('repeats')} its {r['iterations_max']} ({r['iterations_mean']:.1f}) res {r['residual_in_tolerances']:.2f} gW {r['gradient_error'] or 0:.1e} gu {r['input_gradient_error'] or 0:.1e} {r['refused'] or ''}")


main()
