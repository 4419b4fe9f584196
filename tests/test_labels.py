"""Labels are numbers or names of classes; a name that is nearly right gets a hint."""

import time
import unicodedata

import pytest

from dydit_jax.errors import InputError
from dydit_jax.labels import read_labels

NAMES = ("tench, Tinca tinca", "golden retriever", "7", "Tinca tinca")


@pytest.mark.parametrize(
    "words, labels",
    [
        (["0", 3, "4"], [0, 3, 4]),
        (["golden retriever", " Golden  Retriever "], [1, 1]),
        (["tench", "tench, tinca tinca"], [0, 0]),
        (["tinca tinca"], [3]),  # a whole name comes before a synonym
        (["2"], [2]),  # a number is the label, not the class of that name
    ],
)
def test_words_stand_for_labels(words, labels):
    assert read_labels(words, 4, NAMES, "--labels").tolist() == labels


def test_name_as_written_comes_before_other_cases_and_these_before_synonyms():
    names = ("A", "a", "maillot", "maillot, tank suit", "Tank Suit")
    words = ["a", "A", "maillot", "Maillot", "tank suit"]
    assert read_labels(words, 5, names, "--labels").tolist() == [1, 0, 2, 2, 4]


@pytest.mark.parametrize("word", ["crane", "CRANE", "bird"])
def test_name_of_several_classes_is_refused_with_their_numbers(word):
    names = ("crane", "tulip, bird", "crane", "hen, bird")
    numbers = "1, 3" if word == "bird" else "0, 2"
    with pytest.raises(InputError, match=f"^--labels: '{word}' is the name of the classes {numbers}; give the number"):
        read_labels(["tulip", word], 4, names, "--labels")
    assert read_labels(["0", "2", "tulip"], 4, names, "--labels").tolist() == [0, 2, 1]


@pytest.mark.parametrize("form", ["NFC", "NFD"])  # Linux and most keyboards; macOS
def test_accents_are_the_same_however_they_are_encoded(form):
    names = [unicodedata.normalize(form, name) for name in ("café", "Æble, Öl")]
    for typed in ("NFC", "NFD"):
        words = [unicodedata.normalize(typed, word) for word in ("café", "CAFÉ", "öl")]
        assert read_labels(words, 2, names, "--labels").tolist() == [0, 0, 1]


def test_many_names_are_read_at_once():
    names = [f"class {number}, alias {number}" for number in range(1000)]
    words = [f"Alias {number % 1000}" for number in range(50_000)]
    began = time.process_time()
    assert read_labels(words, 1000, names, "--labels_file").tolist() == [number % 1000 for number in range(50_000)]
    assert time.process_time() - began < 5  # minutes where each word reads all names


def test_typo_is_answered_with_near_names():
    with pytest.raises(InputError, match="from 0 to 3 .4 for no class. or names of classes, not golden retreiver."):
        read_labels(["1", "golden retreiver"], 4, NAMES, "--labels")
    with pytest.raises(InputError, match="Did you mean 'golden retriever'[?]"):
        read_labels(["golden retreiver"], 4, NAMES, "--labels")
    with pytest.raises(InputError, match="not xyz. Names: tench, Tinca tinca, golden retriever, 7, Tinca tinca."):
        read_labels(["xyz"], 4, NAMES, "--labels")


@pytest.mark.parametrize("word", ["-1", "5", "1.0", "1" * 13, "²", "", "one"])
def test_what_is_no_label_is_refused(word):
    with pytest.raises(InputError, match="labels must hold numbers from 0 to 3"):
        read_labels([word], 4, (), "labels")


def test_unconditional_models_know_no_class_alone():
    assert read_labels([0], 0, (), "labels").tolist() == [0]
    with pytest.raises(InputError, match="labels must hold 0, for no class, not 1[.]"):
        read_labels([1], 0, (), "labels")
