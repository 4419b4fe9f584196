"""The order of training examples: batches are a pure function of seed and step, whatever the number of processes.

So a run that goes on needs its step alone.
"""

import numpy as np

from dydit_jax.data.sources import DataConfig, DataSource, draw_example


def examples(source: DataSource, *, count: int) -> dict:
    """Return examples spread evenly over a dataset, the same at every call.

    Args:
      source: from `open_source`.
      count: how many; all of a smaller dataset.

    Returns:
      {"image": [n,side,side,C], "label": [n]}.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int))
    rows = [draw_example(source, int(index)) for index in indices]
    return {name: np.stack([row[name] for row in rows]) for name in ("image", "label")}


class _Batches:
    """The batches of a run by their number, or some rows of each: random access for reading ahead."""

    def __init__(self, examples, batch_size: int, rows: np.ndarray):
        self._examples, self._size, self._rows = examples, batch_size, rows

    def __len__(self):
        return len(self._examples) // self._size

    def __getitem__(self, step):
        rows = [self._examples[step * self._size + int(row)] for row in self._rows]
        image = np.stack([row["image"] for row in rows])
        return {"image": image, "label": np.array([row["label"] for row in rows], np.int32)}


def batches(source: DataSource, config: DataConfig, *, start: int, rows=None):
    """Iterate over the batches from step `start` on, endlessly.

    Args:
      source: from `open_source`.
      config: how many at once, in which order.
      start: the first step's number.
      rows: of the global batch, those that this process brings; all by default.

    Returns:
      An iterator of {"image": [rows,side,side,C], "label": [rows]}; every epoch is shuffled again.
    """
    import grain  # here: only training needs it

    dataset = grain.MapDataset.source(source).seed(config.seed).shuffle().repeat()
    if hasattr(source, "draw"):
        # Before rows are chosen, so that the draws belong to the global batch.
        dataset = dataset.random_map(source.draw)
    rows = np.arange(config.batch_size) if rows is None else rows
    dataset = grain.MapDataset.source(_Batches(dataset, config.batch_size, rows))
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads)
    return iter(dataset[start:].to_iter_dataset(options))
