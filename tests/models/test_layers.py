"""The layer table in a notebook; its numbers are checked by test_summary.py, as text."""

from html.parser import HTMLParser

import flax.linen as nn
import jax
import pytest
from conftest import OwnDecoder

import jaxvae
from jaxvae.models.summary import summary

pytestmark = pytest.mark.usefixtures("compile_quickly")

MODEL = jaxvae.ModelConfig((8, 8, 1), network="mlp:width=8", prior="mixture:components=3")


class Table(HTMLParser):
    """The texts of the cells of each row, and the text below the table."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.below, self._open = [], "", []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1] == "code":
            self.below += data
        else:
            self.rows[-1][-1] += data


def cells(text):
    """The words of the rows of a table, in whatever form."""
    return [" ".join(row).split() for row in text]


@pytest.mark.parametrize("config", [jaxvae.ModelConfig(), MODEL], ids=["conv", "mixture"])
def test_a_notebook_shows_the_table_of_the_summary_and_the_text(config):
    params = jax.eval_shape(jaxvae.init, jax.random.key(0), config)
    table = Table(params._repr_html_())
    lines = [[line] for line in summary(config).splitlines()[:-1] if line and line[0] != "-"]
    assert cells(table.rows) == cells(lines)
    assert {len(row) for row in table.rows} == {4}
    assert table.below == repr(params)


def test_stacked_traced_and_deleted_parameters_have_the_same_table():
    def initial(key):
        params = jaxvae.init(key, MODEL)
        traced.append(params._repr_html_())
        return params

    traced = []
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.eval_shape(jax.vmap(initial), keys)
    state = jaxvae.create_train_state(jax.random.key(0), MODEL, jaxvae.TrainConfig())
    jax.tree.map(lambda leaf: leaf.delete(), state)
    shown = [Table(html) for html in (*traced, stacked._repr_html_(), state._repr_html_())]
    assert shown[0].rows == shown[1].rows == shown[2].rows
    assert shown[2].below == repr(state)


def test_names_are_escaped():
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, images):
            flat = images.reshape(len(images), -1)
            return nn.Dense(2, name="<b>mean")(flat), nn.Dense(2, name="log_var")(flat)

    config = jaxvae.ModelConfig((8, 8, 1), network=(Encoder(), OwnDecoder((8, 8, 1))))
    table = Table(jax.eval_shape(jaxvae.init, jax.random.key(0), config)._repr_html_())
    assert ["<b>mean", "2", "64 x 2", "130"] in table.rows
