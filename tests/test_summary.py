"""The layer table."""

import jaxvae
from jaxvae.summary import summary


def test_the_notebooks_table():
    lines = summary(jaxvae.ModelConfig()).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert "conv_1 28 x 28 x 32 3 x 3 x 1 x 32 320" in rows
    assert "conv_2 14 x 14 x 64 3 x 3 x 32 x 64 18,496" in rows
    assert "dense 32 12544 x 32 401,440" in rows
    assert "conv_transpose 28 x 28 x 32 3 x 3 x 64 x 32 18,464" in rows
    assert "conv 28 x 28 x 1 3 x 3 x 32 x 1 289" in rows
    assert "494,244" in rows
    assert "56,385" in rows
    assert rows[-1] == "550,629 parameters"


def test_layers_stand_in_the_order_in_which_images_pass_them():
    names = [line.split()[0] for line in summary(jaxvae.ModelConfig()).splitlines() if line]
    encoder = ["images", "conv_1", "conv_2", "conv_3", "conv_4", "dense", "mean", "log_var"]
    assert names[2:10] == encoder
    assert names[13:17] == ["latents", "dense", "conv_transpose", "conv"]


def test_any_image_shape_has_one():
    assert "13 x 9 x 3" in summary(jaxvae.ModelConfig(image_shape=(13, 9, 3), latent_dim=7))
