"""Prefetching in threads: order, bounds, errors, closing."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.threads import MOST_BYTES, prefetched, size_of


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_the_order_of_the_keys(workers):
    def slow_if_even(i):
        time.sleep(0.01 if i % 2 == 0 else 0)
        return i * i

    assert list(prefetched(slow_if_even, range(12), workers)) == [i * i for i in range(12)]


def test_keys_may_be_endless_and_are_read_no_further_than_needed():
    read = []

    def keys():
        for i in itertools.count():
            read.append(i)
            yield i

    results = prefetched(str, keys(), workers=2, ahead=3)
    assert list(itertools.islice(results, 2)) == ["0", "1"]
    results.close()
    assert read == [0, 1, 2, 3, 4]


def test_without_workers_a_result_is_made_when_it_is_needed():
    threads = []
    results = prefetched(lambda _: threads.append(threading.current_thread()), range(3), workers=0)
    next(results)
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_in_its_turn(workers):
    results = prefetched(lambda i: 1 // (3 - i), range(6), workers)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_cancels_what_has_not_begun_and_waits_for_what_has():
    begun, finished = [], []

    def make(i):
        begun.append(i)
        time.sleep(0.05)
        finished.append(i)

    before = threading.active_count()
    results = prefetched(make, range(100), workers=2, ahead=50)
    next(results)
    results.close()
    assert len(begun) < 10
    assert finished
    assert sorted(begun) == sorted(finished)
    assert threading.active_count() == before


def test_the_initializer_runs_first_in_every_thread():
    local = threading.local()
    results = prefetched(lambda _: local.ready, range(4), 2, initializer=lambda: setattr(local, "ready", True))
    assert list(results) == [True] * 4


def test_large_results_are_made_ahead_by_their_bytes():
    class Large:
        nbytes = MOST_BYTES // 4

    made = []
    results = prefetched(lambda i: made.append(i) or Large(), range(40), workers=2, ahead=30)
    for used in range(1, 33):  # the last ones have fewer to come
        next(results)
        deadline = time.monotonic() + 30
        while len(made) < used + 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(made) == used + 4  # four wait, however slow the threads; 30 without the bound
    results.close()


def test_the_size_of_a_result_counts_arrays_tensors_images_and_bytes_in_its_parts():
    image = Image.new("RGB", (10, 20))
    assert size_of((b"abc", np.zeros(5), torch.zeros(2, 3), image)) == 3 + 40 + 24 + 600
    assert size_of("text") == size_of(None) == size_of(3) == 0
