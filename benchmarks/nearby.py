"""Each concept erased by itself, with and without nearby words preserved: pictures of the embedded model, read by its classifier.

``python benchmarks/nearby.py [--concepts 6] [--images 12]``. Concepts are planned one by one: the others are neighbours that nobody named.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import fmean

from sepme.concepts import ConceptBook
from sepme.demo.run import demo_suite
from sepme.evaluate.classifiers import EmbeddedClassifier
from sepme.evaluate.erasers import Separable
from sepme.evaluate.measure import share
from sepme.evaluate.sampler import Sampler
from sepme.hosts.diffusers import DiffusersHost
from sepme.plan.directions import PlanOptions
from sepme.plan.nearby import COUNT
from sepme.plan.planner import Planner
from sepme.train import TrainOptions, make_delta

PLANS = {
    "none": PlanOptions(),
    "nearby": PlanOptions(nearby=COUNT),
    "nearby, tolerance .012": PlanOptions(nearby=COUNT, tolerance=0.012),
    "nearby, tolerance .03": PlanOptions(nearby=COUNT, tolerance=0.03),
    "nearby, soft": PlanOptions(nearby=COUNT, mode="soft"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=6)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--objectives", nargs="+", default=["closed-form", "gcirs"])
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    given = parser.parse_args()
    suite = demo_suite(images=given.images)
    host = DiffusersHost.load("demo")
    sampler = Sampler(host, EmbeddedClassifier(), suite, lambda: None)
    chosen = demo_suite(given.concepts).names
    print("| objective | plan | erased | unseen | co-occurring | neighbours read | bit-identical | rank | planning, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for objective in given.objectives:
        for label in given.plans:
            plan = PLANS[label]
            rows: dict[str, list[float]] = {}
            for name in chosen:
                started = time.process_time()
                book = suite.book()
                planner = Planner(host, ConceptBook((replace(book[name]),)), plan)
                planner.plan(name)
                seconds = time.process_time() - started
                delta = make_delta(planner, name, host, TrainOptions.for_mode(objective=objective))
                eraser, sets = Separable([delta]), sampler.sets
                batches = sets.own(name), sets.own(name, unseen=True), sets.both(name), sets.others(name)
                own, unseen, both, others = (sampler.sample(batch, eraser, [name]) for batch in batches)
                figures = {
                    "erased": own.accuracy, "unseen": unseen.accuracy, "both": both.accuracy, "others": others.accuracy,
                    "same": share([others]), "rank": delta.rank, "seconds": seconds,
                }  # fmt: skip
                for key, value in figures.items():
                    rows.setdefault(key, []).append(value)
            print(f"| {objective} | {label} | " + " | ".join(f"{fmean(v):.3f}" for v in rows.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
