"""Sounds to tokens and back: Fourier, mel bands, Griffin-Lim, errors; spoken words in many languages.

N sounds, T samples
"""

import io
import os
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_stamps import assert_same

from m4.data.sources import spoken, stamps
from m4.data.sources.sounds import INSTALL, decode_sound, of_length
from m4.data.sources.spoken import RATE, Spoken, compose, read_sound
from m4.data.sources.stamps import SPLITS
from m4.registry import from_json, to_json
from m4.tokens.tokenizer import load_tokenizer, save_tokenizer
from m4_tokenizers.modalities.audio import AudioRecipe, AudioTokenizer, griffin_lim, istft, mel_bands, spread, stft
from m4_tokenizers.networks.patch_mixing import PatchDecoder, PatchEncoder

needs_soundfile = pytest.mark.skipif(find_spec("soundfile") is None, reason=INSTALL)
needs_corpus = pytest.mark.skipif(not Path(Spoken().path).is_dir(), reason=stamps.INSTALL)
SHORT = {"seconds": 0.512, "image_size": 32}  # 8192 samples, hop 256


def tone(hertz: float, *, seconds: float = 0.512, loudness: float = 0.5) -> np.ndarray:
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def voice(seed: int, *, num_samples: int = 8192) -> np.ndarray:
    """Something like a word: gliding harmonics under two formants, that begin and end in silence."""
    rng = np.random.default_rng(seed)
    place = np.linspace(0, 1, num_samples)
    hertz = rng.uniform(90, 250) * (1 + rng.uniform(-0.3, 0.3) * place)
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    formants = rng.uniform(300, 900) + 300 * place, rng.uniform(1200, 3000) - 400 * place
    sound = np.zeros(num_samples)
    for k in range(1, 30):
        sound += sum(np.exp(-(((k * hertz - formant) / 200) ** 2)) for formant in formants) * np.sin(k * phase)
    start, stop = rng.uniform(0, 0.2), rng.uniform(0.6, 1)
    inside = (place > start) & (place < stop)
    sound *= np.where(inside, np.sin(np.pi * (place - start) / (stop - start)), 0)
    return (rng.uniform(0.2, 0.9) * sound / np.abs(sound).max()).astype(np.float32)


def loudest_frequency(sound: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(sound * np.hanning(len(sound)))).argmax() * RATE / len(sound))


# ---- Fourier, Griffin-Lim, mel bands --------------------------------------------------------------------------------


@pytest.mark.parametrize("hop", [64, 125, 256])
def test_fourier_and_back(hop):
    sounds = np.random.default_rng(0).normal(size=(3, 20 * hop)).astype(np.float32)
    spectra = stft(sounds, hop)
    assert spectra.shape == (3, 20, hop + 1) and spectra.dtype == np.complex64
    np.testing.assert_allclose(istft(spectra, hop), sounds, atol=1e-4)


def test_a_sine_of_full_scale_has_magnitude_one():
    magnitudes = np.abs(stft(tone(1000, loudness=1)[None], 256))[0, 1:-1]
    np.testing.assert_allclose(magnitudes.max(axis=1), 1, atol=1e-3)
    assert (magnitudes.argmax(axis=1) == 1000 / RATE * 512).all()


@pytest.mark.parametrize("hertz", [220, 1000, 3300])
def test_griffin_lim_keeps_the_frequency_of_a_tone(hertz):
    """Within a frequency of the transform, and nearly its loudness; the more steps, the nearer the magnitudes."""
    wanted = np.abs(stft(tone(hertz)[None], 256))
    sounds = {n: griffin_lim(wanted, 256, num_steps=n) for n in (0, 4, 60)}
    assert abs(loudest_frequency(sounds[60][0]) - hertz) < RATE / 512 / 2
    assert 0.5 < np.sqrt((sounds[60] ** 2).mean()) / np.sqrt(0.5**2 / 2) < 1.1
    far = [np.linalg.norm(np.abs(stft(s, 256)) - wanted) / np.linalg.norm(wanted) for s in sounds.values()]
    assert far[2] < far[1] < far[0] and far[2] < 0.15


def test_griffin_lim_is_the_same_alone_and_in_a_batch():
    wanted = np.abs(stft(np.stack([voice(0), voice(1)]), 256))
    both, alone = (griffin_lim(x, 256, num_steps=8) for x in (wanted, wanted[1:]))
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)


def test_mel_bands_and_back():
    """Bands are averages, from high to low; spread magnitudes are not negative and have the bands that were wanted."""
    bands = mel_bands(32, 257, RATE)
    np.testing.assert_allclose(bands.sum(axis=1), 1, atol=1e-5)
    middles = bands @ np.linspace(0, RATE / 2, 257)
    assert (np.diff(middles) < 0).all() and middles[-1] < 150 and middles[0] > 6500
    wanted = np.einsum("nfk,mk->nfm", np.abs(stft(np.stack([voice(i) for i in range(4)]), 256)), bands)
    magnitudes = spread(wanted.astype(np.float32), bands)
    assert magnitudes.min() >= 0
    assert np.linalg.norm(magnitudes @ bands.T - wanted) < 0.05 * np.linalg.norm(wanted)
    assert mel_bands(128, 65, RATE).sum(axis=1).min() > 0.99  # more bands than frequencies: none is empty


# ---- The tokenizer --------------------------------------------------------------------------------------------------


def test_arrays_are_pictures_of_sounds():
    """High tones are above low ones, loud is bright, time goes to the right; the way back loses little."""
    recipe = AudioRecipe(**SHORT)
    high, low = (recipe.to_arrays([tone(hertz)])[0, :, 5, 0].argmax() for hertz in (4000, 300))
    assert high < 12 and low > 22
    loud, quiet = (recipe.to_arrays([tone(500, loudness=x)]).max() for x in (0.9, 0.09))
    assert abs((loud - quiet) / 2 * 80 - 20) < 0.1  # dB
    late = np.concatenate([np.zeros(4096, np.float32), tone(500)[:4096]])
    columns = recipe.to_arrays([late])[0, ..., 0].max(axis=0)
    assert (columns[:15] == -1).all() and (columns[17:] > 0).all()
    sounds = [voice(i) for i in range(8)]
    arrays = recipe.to_arrays(sounds)
    assert arrays.shape == (8, 32, 32, 1) and arrays.dtype == np.float32 and arrays.min() >= -1 and arrays.max() <= 1
    back = recipe.to_signals(arrays)
    assert back[0].shape == (8192,) and back[0].dtype == np.float32 and np.abs(np.stack(back)).max() <= 1
    bound, others = recipe.measure(sounds, back, []), recipe.measure(sounds, sounds[1:] + sounds[:1], [])
    assert all(bound[name] < others[name] / 3 for name in bound)


def test_silence_stays_silent():
    recipe = AudioRecipe(**SHORT)
    silence = np.zeros(8192, np.float32)
    assert (recipe.to_arrays([silence]) == -1).all()
    (back,) = recipe.to_signals(recipe.to_arrays([silence]))
    np.testing.assert_array_equal(back, silence)
    assert recipe.measure([silence], [back], []) == {"spectral_distance": 0.0, "cepstral_distortion": 0.0}


def test_measures_are_in_decibels():
    """Twice as loud is 6 dB away, and of the same spectral shape."""
    recipe, sounds = AudioRecipe(**SHORT, lowest=-200), [tone(700, loudness=0.2) + voice(3) / 10]
    found = recipe.measure(sounds, [2 * sound for sound in sounds], [])
    assert abs(found["spectral_distance"] - 20 * np.log10(2)) < 1e-3 and found["cepstral_distortion"] < 1e-3
    shape = recipe.measure(sounds, [voice(5)], [])
    assert 0 < shape["cepstral_distortion"] < shape["spectral_distance"]


def test_clear_errors():
    recipe, sound = AudioRecipe(**SHORT), voice(0)
    with pytest.raises(ValueError, match=r"a sound \(audio\) of \[8191\] was given; allowed: \[8192\]"):
        recipe.to_arrays([sound[1:]])
    with pytest.raises(ValueError, match=r"a sound \(audio\) of \[8192, 2\]"):
        recipe.to_arrays([np.stack([sound, sound], axis=1)])
    with pytest.raises(ValueError, match=r"a sound of int16 was given; allowed: float \[8192\] in \[-1, 1\], 16000"):
        recipe.to_arrays([(sound * 32767).astype(np.int16)])
    with pytest.raises(ValueError, match="a sound reaches 2.*e.04, but this tokenizer reads"):
        recipe.to_arrays([sound * np.float32(32767)])
    with pytest.raises(ValueError, match="not finite"):
        recipe.to_arrays([np.where(sound == sound.max(), np.nan, sound)])
    with pytest.raises(
        ValueError, match="seconds=2.03 .* 32480 samples; allowed: a multiple of image_size=64, as seconds=2.028"
    ):
        AudioRecipe(seconds=2.03)
    with pytest.raises(ValueError, match="lowest=0 dB must be below 0"):
        AudioRecipe(lowest=0)


@pytest.fixture(scope="module")
def tokenizer() -> AudioTokenizer:
    recipe = AudioRecipe(
        **SHORT, encoder=PatchEncoder(num_blocks=0), decoder=PatchDecoder(num_blocks=1, width=36), num_steps=40,
        num_held_out=16, num_phase_steps=8,
    )  # fmt: skip
    return recipe.fit([{"audio": voice(i)} for i in range(120)], seed=0)


def test_a_tokenizer_lies_between_the_mean_and_its_bound(tokenizer):
    card = tokenizer.card
    for name in ("spectral_distance", "cepstral_distortion"):
        assert card[f"{name}_of_spectrogram"] < card[name] < 0.8 * card[f"{name}_of_mean"]
    (ids,) = tokenizer.encode([voice(200)])
    assert ids.shape == (16,) == (tokenizer.modality.max_tokens,)


def test_a_tokenizer_is_what_was_saved(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "a.safetensors")
    loaded = load_tokenizer(tmp_path / "a.safetensors")
    save_tokenizer(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert isinstance(loaded, AudioTokenizer) and loaded.recipe == tokenizer.recipe
    sounds = [voice(i) for i in range(3)]
    np.testing.assert_array_equal(loaded.encode(sounds), tokenizer.encode(sounds))
    np.testing.assert_array_equal(loaded.decode(loaded.encode(sounds)), tokenizer.decode(tokenizer.encode(sounds)))


@needs_soundfile
def test_files_of_sounds(tokenizer, tmp_path):
    """What is written reads back; other rates, lengths, channels and formats are brought to the recipe's."""
    import soundfile

    sound = voice(0)
    tokenizer.write(sound, tmp_path, image=None)
    np.testing.assert_allclose(tokenizer.read(str(tmp_path / "audio.wav")), sound, atol=1e-4)
    with Image.open(tmp_path / "audio.png") as picture:
        assert picture.size == (32, 32)
    assert tokenizer.draw(tone(500), image=None).max() > tokenizer.draw(tone(500, loudness=0.01), image=None).max()
    time = np.arange(44_100) / 44_100
    for name in ("a.ogg", "a.flac", "a.wav"):
        stereo = np.stack([np.sin(2 * np.pi * 660 * time), np.zeros_like(time)], axis=1)
        soundfile.write(tmp_path / name, 0.5 * stereo, 44_100)
        with pytest.warns(UserWarning, match=r"1\.00 s cut to the first 0\.512"):
            read = tokenizer.read(str(tmp_path / name))
        assert read.shape == (8192,) and abs(loudest_frequency(read) - 660) < 3
        assert abs(np.abs(read).max() - 0.25) < 0.02
    np.testing.assert_array_equal(of_length(sound[:100], 8192)[100:], 0)
    (tmp_path / "b.ogg").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"b\.ogg: not a readable sound"):
        tokenizer.read(str(tmp_path / "b.ogg"))
    soundfile.write(tmp_path / "c.wav", np.zeros(0), RATE)
    with pytest.raises(ValueError, match=r"c\.wav: it holds no sound"):
        tokenizer.read(str(tmp_path / "c.wav"))
    os.mkfifo(tmp_path / "d.ogg")
    with pytest.raises(ValueError, match=r"d\.ogg: a FIFO; allowed: files"):
        read_sound(tmp_path / "d.ogg", RATE)


def wav(samples: np.ndarray, *, rate: int = RATE, announced: int = 0) -> bytes:
    """`announced`: bytes of sound that the header tells, if not those that there are."""
    data, floats = samples.tobytes(), samples.dtype.kind == "f"
    size, length = samples.dtype.itemsize, announced or len(data)
    header = struct.pack("<IHHIIHH", 16, 3 if floats else 1, 1, rate, rate * size % 2**32, size, 8 * size)
    chunks = b"WAVEfmt " + header + b"data" + struct.pack("<I", length) + data
    return b"RIFF" + struct.pack("<I", (36 + length) % 2**32) + chunks


@needs_soundfile
def test_sounds_that_are_cut_or_cannot_be_meant_are_refused():
    import soundfile

    sound = (voice(0) * 2**15).astype(np.int16)
    streamed = decode_sound(wav(sound, announced=2**32 - 40))  # by what did not know its length
    np.testing.assert_allclose(streamed.samples, voice(0), atol=1e-4)
    flac = io.BytesIO()
    soundfile.write(flac, sound, RATE, format="flac")
    endless = bytearray(flac.getvalue())
    endless[21:26] = bytes([endless[21] | 15]) + b"\xff" * 4
    for data, message in (
        (wav(sound, announced=3 * sound.nbytes), f"it is cut: {sound.nbytes} bytes of sound are there"),
        (wav(sound)[:9000], "it is cut: 8956 bytes of sound are there"),
        (wav(sound, rate=2**31 - 1), "2,147,483,647 samples a second; allowed: 100 to 1,000,000"),
        (wav(sound, rate=1), "1 samples a second"),
        (wav(sound.astype(np.float32)), "where 1 is full scale"),
        (bytes(endless), "68,719,476,735 samples; allowed: at most"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_sound(data)


# ---- Spoken words ---------------------------------------------------------------------------------------------------

TINY = {"languages": ("en", "fr", "xx"), "size": 16, "num_train": 30, "seconds": 0.512}


@pytest.fixture
def tiny(tmp_path) -> str:
    """A corpus of squares with recordings: a tone for each stamp and language, none in xx of every third stamp."""
    soundfile = pytest.importorskip("soundfile", reason=INSTALL)
    folder = tmp_path / "corpus" / "food"
    folder.mkdir(parents=True)
    for i in range(60):
        Image.new("RGBA", (20, 20), (4 * i, 100, 0, 255)).save(folder / f"stamp{i}.png")
        (folder / f"stamp{i}.txt").write_text(f"Thing {i}.\nfr.utf8=Chose {i}.\n")
        for k, code in enumerate(("", "_fr", "_xx")[: 2 if i % 3 == 0 else 3]):
            soundfile.write(
                folder / f"stamp{i}_desc{code}.ogg", tone(200 + 20 * i + 2000 * k, seconds=0.1 * (4 + k)), RATE
            )
    return str(tmp_path / "corpus")


def test_examples_say_what_they_show(tiny):
    """Picture, words, language and sound are of one stamp; what is not written in a language is written in English."""
    source, seen = Spoken(path=tiny, **TINY), set()
    for split, count in (("train", 30), ("test", source.count("test"))):
        for i in range(count):
            example = compose(source, split, i)
            number = int(example["words"].split()[1][:-1])
            assert example["words"].split()[0] == {"en": "Thing", "fr": "Chose", "xx": "Thing"}[example["language"]]
            k = TINY["languages"].index(example["language"])
            sound = example["audio"]
            assert sound.shape == (8192,) and sound.dtype == np.float32 and np.abs(sound).max() <= 1
            assert abs(loudest_frequency(sound) - (200 + 20 * number + 2000 * k)) < 10
            assert (sound[round(0.1 * (5 + k) * RATE) :] == 0).all()  # silence to the end
            assert (example["rgb"] == (4 * number, 100, 0)).all(axis=-1).sum() > 16 * 16 / 5**2
            assert example["category"] == "food"
            seen.add((split, example["language"]))
    assert len(seen) == 6


def test_each_turn_shows_each_stamp_once(tiny):
    """In validation and test: every recording once, no stamp twice in a turn, every language in the first turn."""
    source = Spoken(path=tiny, **TINY)
    for split in ("validation", "test"):
        said = source.recordings(split)
        assert len({(r.stamp.file, r.language) for r in said}) == len(said) == source.count(split)
        number = len({r.stamp.file for r in said})
        first = said[:number]
        assert len({r.stamp.file for r in first}) == number and {r.language for r in first} == set(TINY["languages"])
        counts = [sum(r.stamp.file == stamp for r in said) for stamp in {r.stamp.file for r in said}]
        assert set(counts) == {2, 3}
        french = Spoken(path=tiny, **{**TINY, "languages": ("fr",)}).recordings(split)
        assert len({r.stamp.file for r in french}) == len(french) == number


def test_splits_share_no_stamp(tiny):
    files = {split: {r.stamp.file for r in Spoken(path=tiny, **TINY).recordings(split)} for split in SPLITS}
    assert sum(map(len, files.values())) == len(set.union(*files.values())) == 60
    for split in SPLITS:
        assert files[split] == {stamp.file for stamp in stamps.Stamps(path=tiny).stamps(split)}


def test_an_example_is_a_function_of_its_arguments(tiny, tmp_path):
    source = Spoken(path=tiny, seed=3, **TINY)
    first = compose(source, "train", 5)
    assert_same(first, compose(Spoken(path=tiny, seed=3, **{**TINY, "num_train": 9}), "train", 5))
    others = [compose(Spoken(path=tiny, **TINY), "train", 5), compose(source, "train", 6), compose(source, "test", 5)]
    assert all((first["rgb"] != other["rgb"]).any() for other in others)
    assert from_json(to_json(source)) == source
    source.prepare(tmp_path)
    source.prepare(tmp_path)
    for split in SPLITS:
        read = source.split(split, tmp_path)
        assert len(read) == source.count(split)
        for i in range(len(read)):
            assert_same(compose(source, split, i), read[i])
    fields = ({}, {"seed": 1}, {"num_train": 31}, {"languages": ("fr",)}, {"seconds": 1.0}, {"size": 32})
    assert len({Spoken(path=tiny, **{**TINY, **f}).folder(tmp_path) for f in fields}) == len(fields)
    before = source.signature(tmp_path)
    (Path(tiny) / "food" / "stamp1_desc_fr.ogg").write_bytes(b"another")
    assert source.signature(tmp_path) != before


def test_what_is_missing_is_named(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"no stamps in /nowhere; {stamps.INSTALL}"):
        Spoken(path="/nowhere").prepare(tmp_path)
    with pytest.raises(ValueError, match="unknown language 'fe'; allowed: en, fr, xx. Did you mean 'fr'"):
        Spoken(path=tiny, languages=("fe",)).prepare(tmp_path)
    with pytest.raises(ValueError, match="must be different codes, at least one"):
        Spoken(languages=("fr", "fr"))
    with pytest.raises(ValueError, match="num_train is 0, but must be at least 1"):
        Spoken(num_train=0)
    with pytest.raises(ValueError, match="unknown split 'val'.*Did you mean 'validation'"):
        Spoken(path=tiny, **TINY).split("val", tmp_path)
    with pytest.raises(ValueError, match=r"no spoken in .*; call Spoken\.prepare"):
        len(Spoken(path=tiny, **TINY).split("train", tmp_path))
    (Path(tiny) / "food" / "stamp1_desc_fr.ogg").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"stamp1_desc_fr\.ogg: not a readable sound"):
        read_sound(Path(tiny) / "food" / "stamp1_desc_fr.ogg", RATE)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=r'needs the package soundfile.*pip install "m4-jax\[audio\]"'):
        Spoken(path=tiny, **TINY).prepare(tmp_path)


@needs_corpus
@needs_soundfile
def test_the_corpus_speaks_six_languages():
    """Each split has recordings in all of them, in turns that are fit for retrieval."""
    source = Spoken()
    for split in SPLITS:
        said = source.recordings(split)
        assert {r.language for r in said} == set(source.languages) and len(said) > 300
    heard = [compose(source, "test", i) for i in range(0, 60, 5)]
    assert all(e["audio"].shape == (32_768,) and np.abs(e["audio"]).max() > 0.02 for e in heard)
    assert len({e["words"] for e in heard}) == len(heard)


@pytest.fixture(autouse=True)
def fresh_corpus():
    """Corpora of tests come and go; what is known of them is kept by path."""
    yield
    for known in (stamps.corpus, stamps._choices, spoken.recordings, spoken._in_turns):
        known.cache_clear()
