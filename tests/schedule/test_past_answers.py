"""Answers in a buffer are whole, end with −1, and the oldest are overwritten."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np

from nanovllm.schedule.past_answers import END, PastAnswers


def test_the_latest_answers_are_whole_and_no_text_goes_on_in_another() -> None:
    made, size = random.Random(0), 60
    past, buffer, answers = PastAnswers(size), np.full(size, END), []
    for number in range(1, 80):
        answer = [number] * made.choice([0, 1, 7, 19, 59, 60, 99])
        past.add(answer)
        answers.append(answer[-(size - 1) :])
        for start, token_ids in past.take():
            buffer[start : start + len(token_ids)] = token_ids
        text = " ".join(map(str, [END, *buffer, END]))
        newest = next(one for one in reversed(answers) if one)
        assert f" {END} {' '.join(map(str, newest))} {END}" in f" {text} "
        assert all(a == b for a, b in pairwise(buffer) if END not in (a, b))
    assert past.take() == []
