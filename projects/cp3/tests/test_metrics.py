"""Scores against hand-worked values and scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from projects.cp3.metrics import (
    accuracies,
    classification_scores,
    confusion_matrix,
    mean_iou,
    part_scores,
    segmentation_scores,
)


def draw(count=300, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count)
    guess = np.where(rng.random(count) < 0.6, label, rng.integers(0, classes, count))
    return torch.from_numpy(guess), torch.from_numpy(label)


def one_hot(guess, classes):
    """Logits (K, N) of these guesses."""
    return torch.nn.functional.one_hot(torch.as_tensor(guess), classes).T.float()


def test_confusion_matrix_and_accuracies_equal_scikit_learns():
    guess, label = draw()
    matrix = confusion_matrix(guess, label, 6)
    assert np.array_equal(matrix, metrics.confusion_matrix(label, guess, labels=range(6)))
    found = classification_scores(one_hot(guess, 6).T, label)
    assert found["oa"] == pytest.approx(100 * metrics.accuracy_score(label, guess))
    assert found["macc"] == pytest.approx(100 * metrics.recall_score(label, guess, average="macro"))
    assert mean_iou(matrix) == pytest.approx(100 * metrics.jaccard_score(label, guess, average="macro"))


def test_accuracies_by_hand():
    """Of 4, 2 and 0 objects 3 and 1 are found: 4 of 6 in all, 75 % and 50 % of the two classes there are."""
    label, guess = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 2, 1, 0])
    found = classification_scores(one_hot(guess, 3).T, label)
    assert found == {"oa": pytest.approx(400 / 6), "macc": pytest.approx(62.5)}
    # intersections 3, 1, 0 over unions 5, 2, 1
    assert mean_iou(confusion_matrix(guess, label, 3)) == pytest.approx(100 * (3 / 5 + 1 / 2 + 0) / 3)


def test_classes_that_neither_occur_nor_are_guessed_do_not_count():
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[0, 0], matrix[1, 0] = 3, 1
    assert accuracies(matrix) == {"oa": 75.0, "macc": 50.0}
    assert mean_iou(matrix) == pytest.approx(100 * (3 / 4 + 0) / 2)


def part(logits, label, index, room=0, points=6):
    return {
        "logits": torch.as_tensor(logits).half()[None], "label": torch.as_tensor(label)[None],
        "index": torch.as_tensor(index)[None], "room": torch.tensor([room]), "room_points": torch.tensor([points]),
    }  # fmt: skip


def test_overlapping_parts_of_a_room_are_averaged_and_each_point_counts_once():
    label = torch.tensor([0, 1, 1, 0, 1, 0])
    first = part(one_hot([0, 1, 0, 0], 2), label[:4], range(4))
    # points 2 and 3 again, out of order, surer than before
    second = part(3 * one_hot([1, 1, 1], 2), label[[3, 2, 4]], [3, 2, 4])
    found = segmentation_scores([first, second], 2)
    # guessed: 0, 1, 1, 1, 1; point 5 is in no part
    guess = torch.tensor([0, 1, 1, 1, 1])
    assert found["oa"] == pytest.approx(80)
    assert found["macc"] == pytest.approx(100 * metrics.recall_score(label[:5], guess, average="macro"))
    assert found["miou"] == pytest.approx(100 * metrics.jaccard_score(label[:5], guess, average="macro"))
    assert segmentation_scores([second, first], 2) == found


def test_scenes_are_scored_together_and_unlabelled_points_left_out():
    guess, label = draw(40, 3)
    label[7] = -1
    parts = [part(one_hot(guess[:25], 3), label[:25], range(25), room=4, points=25),
             part(one_hot(guess[25:], 3), label[25:], range(15), room=2, points=15)]  # fmt: skip
    found = segmentation_scores(parts, 3)
    seen = label >= 0
    assert found["miou"] == pytest.approx(100 * metrics.jaccard_score(label[seen], guess[seen], average="macro"))
    assert found["oa"] == pytest.approx(100 * metrics.accuracy_score(label[seen], guess[seen]))


def test_parts_by_hand():
    """Two shapes of parts 0-1 and one of parts 2-4; logits of other shapes' parts are never looked at."""
    parts_of_shape = [(0, 2), (2, 5)]
    logits = torch.zeros(3, 5, 4)
    logits[:2, 2:] = 9
    logits[0, :2] = one_hot([0, 0, 1, 1], 2)
    logits[1, :2] = one_hot([1, 1, 1, 1], 2)
    logits[2, 2:] = one_hot([0, 0, 1, 1], 3)
    logits[2, :2] = 9
    label = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [2, 2, 3, 2]])
    shape = torch.tensor([0, 0, 1])
    # 1/2 and 2/3; 1 (part 0 is nowhere) and 1; 2/3, 1/2 and 1 (part 4 is nowhere)
    each = [(1 / 2 + 2 / 3) / 2, 1.0, (2 / 3 + 1 / 2 + 1) / 3]
    expected = {
        "instance_miou": pytest.approx(100 * sum(each) / 3),
        "class_miou": pytest.approx(100 * ((each[0] + each[1]) / 2 + each[2]) / 2),
    }
    batches = [{"logits": logits.half(), "label": label, "shape": shape}]
    assert part_scores(batches, parts_of_shape) == expected
    apart = [{"logits": logits[i : i + 1], "label": label[i : i + 1], "shape": shape[i : i + 1]} for i in (2, 0, 1)]
    assert part_scores(apart, parts_of_shape) == expected
