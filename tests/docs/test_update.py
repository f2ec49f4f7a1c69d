"""`python -m tests.docs.update` renews what pages show, and nothing else."""

from tests.docs.update import refreshed

STALE = """\
```python
x = 3
```
```text
kept
```
```python
print(x)
print(x + 1)
```
```text output
2
```
Text.
```console
$ gemma-xla plan CONFIG
fits
$ gemma-xla flops gemma-2b  # fast
nothing
```
"""


def test_what_a_page_shows_is_written_anew(tmp_path):
    (tmp_path / "stale.md").write_text(STALE)
    text = refreshed(tmp_path / "stale.md")
    assert text.startswith(STALE.partition("2\n```")[0] + "3\n4\n```\nText.\n")
    assert "CONFIG\nfits\n$ gemma-xla flops gemma-2b  # fast\nTFLOP per sequence" in text
    assert "nothing" not in text
    (tmp_path / "fresh.md").write_text(text)
    assert refreshed(tmp_path / "fresh.md") == text
