"""KVCache: cached logits equal uncached ones for every placement and padding; what does not fit is refused."""

import pytest
import torch

from omninorm.config import PLACEMENTS
from omninorm.errors import InputError

CHUNKS = {"prefill, then tokens": [12] + [1] * 8, "uneven chunks": [1, 1, 5, 1, 8, 4]}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_cached_equals_uncached(make, tokens, placement, chunks):
    model = make(placement)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(3, 20)
        parts = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, dim=1)], dim=1)
    assert cache.used == 20
    assert whole.std() > 0.3
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("padding", [[0, 3, 11], [1, 1, 2]])
def test_padded_rows_equal_rows_alone(make, tokens, padding, kv_heads):
    model = make("hybrid", n_kv_heads=kv_heads)
    with torch.no_grad():
        cache = model.new_cache(3, padding=padding)
        padded = torch.cat([model(part, cache=cache) for part in tokens.split([12, 1, 1, 6], dim=1)], dim=1)
        for row, pad in enumerate(padding):
            alone = model(tokens[row : row + 1, pad:])
            torch.testing.assert_close(padded[row : row + 1, pad:], alone, rtol=1e-5, atol=2e-5)


def test_the_mask_is_causal_and_hides_padding(make):
    cache = make().new_cache(2, padding=[0, 2])
    cache.advance(1)
    plain, padded = cache.mask(3)[:, 0].int().tolist()
    assert plain == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_selected_rows_continue_unchanged(make, tokens):
    model = make()
    with torch.no_grad():
        cache = model.new_cache(3, padding=[0, 3, 5])
        model(tokens[:, :12], cache=cache)
        cache.select([2, 1])
        assert (cache.batch, cache.used) == (2, 9)
        assert cache.padding.tolist() == [2, 0]
        two = model(tokens[[2, 1], 12:15], cache=cache)
        cache.select([1])
        assert (cache.batch, cache.used, cache.padding) == (1, 12, None)
        one = model(tokens[[1], 15:], cache=cache)
        alone = model(tokens[[1], 3:])
        torch.testing.assert_close(two[1:], alone[:, 9:12], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(one, alone[:, 12:], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(two[:1], model(tokens[[2], 5:15])[:, 7:], rtol=1e-5, atol=2e-5)


def test_a_full_cache_is_refused_and_stays_unchanged(make, tokens):
    model = make()
    with torch.no_grad():
        cache = model.new_cache(3, 10)
        model(tokens[:, :8], cache=cache)
        with pytest.raises(InputError) as caught:
            model(tokens[:, 8:11], cache=cache)
        assert str(caught.value) == (
            "This cache has room for 10 tokens, got 3 more after 8. "
            "Create a larger cache, or start a new one with the last tokens."
        )
        torch.testing.assert_close(
            model(tokens[:, 8:10], cache=cache), model(tokens[:, :10])[:, 8:], rtol=1e-5, atol=2e-5
        )


@pytest.mark.parametrize("capacity", [0, 25, -1])
def test_a_capacity_out_of_bounds_is_refused(make, capacity):
    with pytest.raises(InputError) as caught:
        make().new_cache(1, capacity)
    assert "max_seq_len=24" in caught.value.invariant
    assert caught.value.received == capacity


@pytest.mark.parametrize("padding", [[1], [0, 0, 1], [-1, 0], [0, 24]])
def test_padding_that_does_not_match_the_rows_is_refused(make, padding):
    with pytest.raises(InputError) as caught:
        make().new_cache(2, padding=padding)
    assert caught.value.received == str(padding)


def test_a_cache_of_another_batch_is_refused(make, tokens):
    model = make()
    with torch.no_grad(), pytest.raises(InputError, match=r"2 rows, got tokens for 3 rows"):
        model(tokens, cache=model.new_cache(2))


def test_a_cache_with_gradients_enabled_is_refused(make, tokens):
    model = make()
    with pytest.raises(InputError) as caught:
        model(tokens, cache=model.new_cache(3))
    assert "torch.no_grad()" in caught.value.remedy


def test_a_new_cache_has_the_dtype_of_the_model(make, tokens):
    model = make().to(torch.bfloat16)
    cache = model.new_cache(3)
    assert cache.keys.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(tokens, cache=cache).dtype == torch.bfloat16


def test_a_cache_works_under_autocast(make, tokens):
    model = make("hybrid")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(3)
        parts = torch.cat([model(part, cache=cache) for part in tokens.split([8, 1, 11], dim=1)], dim=1)
        whole = model(tokens)
    torch.testing.assert_close(parts.float(), whole.float(), rtol=0, atol=0.1)
    assert whole.float().std() > 1
