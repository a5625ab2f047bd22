"""Files as people send them: each bad one is refused in words that say what, where and what to do; none is a
traceback.

Every case goes the whole way, from bytes on disk through `survey`, whose ValueError is what the user reads.
"""

import gzip
import io
import json
import os
import runpy
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from qwenlora.configs.schema import Data
from qwenlora.data.survey import rows_of_side, survey

ROW = {"instruction": "几点？", "output": "三点。"}
TURNS = [{"role": "user", "content": "几点？"}, {"role": "assistant", "content": "三点。"}]
GOOD = json.dumps(ROW, ensure_ascii=False)


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*turns: Any, **more: Any) -> bytes:
    return lines({"messages": list(turns), **more})


def call(arguments: Any, **more: Any) -> bytes:
    calls = [{"type": "function", "function": {"name": "clock", "arguments": arguments}}]
    return chat(TURNS[0], {"role": "assistant", "content": None, "tool_calls": calls}, **more)


def zstd(text: bytes) -> bytes:
    return pa.compress(text, codec="zstd", asbytes=True)


def table(**columns: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def twice() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"]), file)
    return file.getvalue()


def far_future() -> pa.Array:
    return pa.array([2**53], pa.timestamp("s"))  # Python's dates end in the year 9999


def workbook() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    return file.getvalue()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def damaged(text: bytes, at: int) -> bytes:
    return text[:at] + bytes([text[at] ^ 0xFF]) + text[at + 1 :]


GZ, ZST = gzip.compress(lines(*[ROW] * 500)), zstd(os.urandom(5000))

# name of the file, its bytes, words of the message, and what the config says beside it
BAD: dict[str, tuple[str, bytes, list[str], dict[str, Any]]] = {
    # files
    "empty": ("my.jsonl", b"", ["my.jsonl is empty: it has no rows"], {}),
    "white space only": ("my.jsonl", b" \n\n\t\r\n", ["is empty: it has no rows"], {}),
    "mark only": ("my.jsonl", b"\xef\xbb\xbf", ["is empty: it has no rows"], {}),
    "empty array": ("my.json", b"[]", ["is empty: it has no rows"], {}),
    "empty gz": ("my.jsonl.gz", b"", ["is empty: it has no rows"], {}),
    "empty parquet": ("my.parquet", b"", ["no Parquet file: it is empty"], {}),
    "parquet without rows": (
        "my.parquet",
        table(text=pa.array([], pa.string())),
        ["is empty: it has no rows"],
        {},
    ),
    "csv of names only": ("my.csv", b"instruction,output\n", ["is empty: it has no rows"], {}),
    "gz cut off": ("my.jsonl.gz", GZ[:-20], ["gzip data is cut off or damaged", "make the file again"], {}),
    "gz without its checksum": ("my.jsonl.gz", GZ[:-4], ["gzip data is cut off or damaged"], {}),
    "gz cut off in its head": ("my.jsonl.gz", GZ[:5], ["gzip data is cut off or damaged after 0 bytes"], {}),
    "gz damaged": (
        "my.jsonl.gz",
        damaged(GZ, -6),
        ["gzip data is cut off or damaged", "incorrect data check"],
        {},
    ),
    "gz and then rubbish": ("my.jsonl.gz", GZ + b"rubbish", ["gzip data is cut off or damaged"], {}),
    "gz that is none": (
        "my.jsonl.gz",
        lines(ROW),
        ["is not compressed as its name says (.gz)", "rename it"],
        {},
    ),
    "gz in gz": ("my.jsonl.gz", gzip.compress(GZ), ["is compressed twice"], {}),
    "zst cut off": (
        "my.jsonl.zst",
        ZST[:-20],
        ["zstd data is cut off or damaged", "make the file again"],
        {},
    ),
    "zst cut off in its head": ("my.jsonl.zst", ZST[:4], ["zstd data is cut off or damaged"], {}),
    "zst that is none": ("my.jsonl.zst", lines(ROW), ["is not compressed as its name says (.zst)"], {}),
    "parquet in gz": (
        "my.parquet.gz",
        gzip.compress(table(text=["x"])),
        ["a compressed Parquet file; unpack"],
        {},
    ),
    "parquet cut off": (
        "my.parquet",
        table(text=["x"] * 99)[:-9],
        ["Parquet cannot be read", "make the file again"],
        {},
    ),
    "parquet damaged": ("my.parquet", damaged(table(text=["x"]), -8), ["Parquet cannot be read"], {}),
    "parquet that is none": (
        "my.parquet",
        lines(ROW),
        ['no Parquet file: it begins with \'{"instruction":'],
        {},
    ),
    "parquet of bytes": (
        "my.parquet",
        table(text=[b"\xff"]),
        ['my.parquet:1: text must be text, found "<bytes>"'],
        {},
    ),
    "parquet of not UTF-8": (
        "my.parquet",
        table(
            text=pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
        ),
        ["Parquet cannot be read", "'utf-8' codec can't decode byte 0xff"],
        {},
    ),
    "parquet of a far future": (
        "my.parquet",
        table(text=["x"], at=far_future()),
        ["a date is outside the years 1 to 9999"],
        {},
    ),
    "parquet column twice": ("my.parquet", twice(), ['the column "text" stands twice; make'], {}),
    "xlsx": ("my.xlsx", workbook(), ["is a zip archive or Excel workbook; save it as CSV"], {}),
    "xlsx named csv": ("my.csv", workbook(), ["is a zip archive or Excel workbook; save it as CSV"], {}),
    "xls": (
        "my.xls",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512),
        ["an old Excel workbook; save it as CSV"],
        {},
    ),
    "pdf": (
        "my.pdf",
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        ["is a PDF; rows are read from JSON, CSV or Parquet"],
        {},
    ),
    "tar": (
        "my.tar.gz",
        gzip.compress(b"my.jsonl".ljust(257, b"\0") + b"ustar\0" + bytes(250)),
        ["a tar archive"],
        {},
    ),
    "xz": ("my.jsonl.xz", b"\xfd7zXZ\0\0", ["is xz; unpack it"], {}),
    "bz2": ("my.jsonl.bz2", b"BZh91AY&SY", ["is bzip2; unpack it"], {}),
    "arrow": ("my.arrow", b"ARROW1\0\0", ["is an Arrow file; save it as Parquet"], {}),
    "sqlite": ("my.db", b"SQLite format 3\0", ["is an SQLite database; export its rows"], {}),
    "git-lfs pointer": (
        "my.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid ",
        ["git lfs pull"],
        {},
    ),
    "web page": (
        "my.jsonl",
        b"<!doctype html>\n<html>",
        ["is a web page, not the data; download the file itself"],
        {},
    ),
    "NUL bytes only": ("my.jsonl", bytes(4096), ["holds NUL bytes only", "was not written whole"], {}),
    # encodings
    "GB18030 json": (
        "my.jsonl",
        f"{GOOD}\n".encode("gb18030"),
        [":1: not UTF-8 text at byte", "encoding: gb18030"],
        {},
    ),
    "GB18030 array": (
        "my.json",
        f"[{GOOD}]".encode("gb18030"),
        ["my.json: not UTF-8 text at byte", "gb18030"],
        {},
    ),
    "not what was named": (
        "my.jsonl",
        b"\xff\xff\xff",
        ["not gb18030 text at byte 0"],
        {"encoding": "gb18030"},
    ),
    "no such encoding": (
        "my.jsonl",
        lines(ROW),
        ["data.encoding=utf8000: no such encoding"],
        {"encoding": "utf8000"},
    ),
    "encoding of no text": (
        "my.jsonl",
        lines(ROW),
        ["data.encoding=hex: no such encoding"],
        {"encoding": "hex"},
    ),
    "UTF-16 without its mark": ("my.jsonl", GOOD.encode("utf-16-le"), ["data.encoding: utf-16-le"], {}),
    "UTF-16 cut off": (
        "my.jsonl",
        GOOD.encode("utf-16")[:-1],
        ["ends within a character: it was cut off"],
        {},
    ),
    "Latin-1 csv": (
        "my.csv",
        "text\nétude à café\n".encode("latin-1"),
        ["neither UTF-8 nor GB18030; name its encoding"],
        {},
    ),
    "Big5 csv": (
        "my.csv",
        "text\n請問現在幾點鐘？我們應該說\n".encode("big5"),
        ["neither UTF-8 nor GB18030", "data.encoding: big5"],
        {},
    ),
    "half a character at the end": (
        "my.csv",
        "text\n三".encode()[:-1],
        ["ends within a character: it was cut off"],
        {},
    ),
    # JSON
    "cut off line": (
        "my.jsonl",
        f"{GOOD}\n{GOOD[:-9]}".encode(),
        ["1 of 2", ":2: not valid JSON", "cut off?"],
        {},
    ),
    "NUL bytes at the end": (
        "my.jsonl",
        lines(ROW) + bytes(99),
        [":2: not valid JSON", "it holds NUL bytes"],
        {},
    ),
    "single quotes": ("my.jsonl", b"{'text': 'x'}", ["at column 2", "text stands in double quotes"], {}),
    "trailing comma": ("my.jsonl", b'{"text": "x",}', [":1: not valid JSON:", "comma", "at column"], {}),
    "trailing comma of an array": (
        "my.json",
        f"[{GOOD},\n]".encode(),
        ["my.json:2: a comma before the closing ]"],
        {},
    ),
    "trailing comma in an array": (
        "my.json",
        b'[\n{"text": "x",}]',
        ["my.json:2: not valid JSON:", "comma"],
        {},
    ),
    "two rows on a line": (
        "my.jsonl",
        f"{GOOD}{GOOD}".encode(),
        ["more follows the object (one row a line)"],
        {},
    ),
    "array cut off in a row": (
        "my.json",
        f"[{GOOD},\n{GOOD[:-5]}".encode(),
        ["my.json:2: the array is not closed"],
        {},
    ),
    "array cut off between": ("my.json", f"[{GOOD},".encode(), ["my.json:1: the array is not closed"], {}),
    "array cut off after": ("my.json", f"[{GOOD}\n".encode(), ["my.json:2: the array is not closed"], {}),
    "array without commas": (
        "my.json",
        f"[{GOOD}\n{GOOD}]".encode(),
        ["my.json:2: not valid JSON: expected , or ]"],
        {},
    ),
    "more after an array": (
        "my.json",
        f"[{GOOD}]\n{GOOD}".encode(),
        ["my.json:2: expected the end of the file"],
        {},
    ),
    "arrays on lines": (
        "my.jsonl",
        b'["x"]\n["y"]\n',
        ["my.jsonl:2: expected the end of the file", "array of obj"],
        {},
    ),
    "pretty-printed object": (
        "my.json",
        json.dumps(ROW, indent=2).encode(),
        ["an object over several lines", "jq"],
        {},
    ),
    "rows inside data": (
        "my.json",
        lines({"data": [ROW]}),
        ["if data are the rows", "jq -c '.data[]' old > new"],
        {},
    ),
    "rows inside data, printed": (
        "my.json",
        json.dumps({"version": 1, "data": [ROW, ROW]}, indent=1).encode(),
        ["is one JSON object, its rows are in data", "jq -c '.data[]' old > new"],
        {},
    ),
    "plain text": (
        "my",
        "人之初，性本善。\n".encode(),
        ["not valid JSON", 'plain text? name the file .txt, or write rows: {"text": "..."}'],
        {},
    ),
    "key twice": (
        "my.jsonl",
        b'{"text": "x", "text": "y"}',
        ['has the key "text" twice in one object; keep one'],
        {},
    ),
    "key twice in an array": (
        "my.json",
        b'[{"text": "x", "text": "y"}, 1]',
        ["my.json:1: has the key", "twice"],
        {},
    ),
    "key twice in a turn": (
        "my.jsonl",
        chat(*TURNS).replace(b'"role": "user"', b'"role": "user", "role": "user"'),
        ['has the key "role" twice in one object'],
        {},
    ),
    "key twice in arguments as text": (
        "my.jsonl",
        call('{"a": 1, "a": 2}'),
        ['has the key "a" twice in one object'],
        {},
    ),
    "deep JSON": ("my.jsonl", b"[" * 99 + b'{"a":' * 100_000, ["JSON nested too deeply"], {}),
    "deep JSON on a line": ("my.jsonl", b'{"a":' * 100_000, [":1: JSON nested too deeply"], {}),
    "deep arguments": ("my.jsonl", call(nested(150)), ["turn 2 has JSON nested more than 100 deep"], {}),
    "number without end": (
        "my.jsonl",
        b'{"text": ' + b"9" * 5000 + b"}",
        [":1: holds a number of more than 4,300"],
        {},
    ),
    "number without end in an array": (
        "my.json",
        b"[" + b"9" * 5000 + b"]",
        [":1: holds a number of more than"],
        {},
    ),
    "long line": (
        "my.jsonl",
        lines({"text": "x" * 5_000_000, "label": 1, "output": 1}, {"a": 1}),
        [":2: unknown"],
        {},
    ),
    "5 MB of the wrong type": (
        "my.jsonl",
        lines({"text": ["x" * 5_000_000]}),
        ['text must be text, found ["xxx'],
        {},
    ),
    # tables
    "ragged csv": (
        "my.csv",
        b"instruction,output\nq,a\nq,a,b\n",
        [":3: has 3 columns, the first line names 2"],
        {},
    ),
    "open quote": (
        "my.csv",
        b'instruction,output\nq,a\n"q,a\nq,a\n',
        ["my.csv:3:", "quote is opened", "never closed"],
        {},
    ),
    "quote in a quote": (
        "my.csv",
        b'instruction,output\n"say "hi"",a\n',
        ["my.csv:2: not valid CSV", '""hi""'],
        {},
    ),
    "column twice": (
        "my.csv",
        b"text,text\nq,a\n",
        ['my.csv:1: the column "text" stands twice; rename one'],
        {},
    ),
    "column without a name": (
        "my.csv",
        b"instruction,output,\nq,a,\n",
        ["my.csv:1: a column has no name"],
        {},
    ),
    "csv without names": (
        "my.csv",
        "现在几点？,三点。\n你好吗？,很好。\n".encode(),
        ["unknown shape with keys 现在几点？, 三点。", "the first line of a table names its columns"],
        {},
    ),
    "carriage returns only": (
        "my.csv",
        b"text\rx\ry\r",
        ["not valid CSV", "carriage return", "mac2unix"],
        {},
    ),
    "turns by Python's str": (
        "my.csv",
        f'messages\n"{[{"role": "user"}]}"\n'.encode(),
        ["messages must be JSON, found", "text stands in double quotes", "json.dumps"],
        {},
    ),
    # shapes
    "mixed shapes": (
        "my.jsonl",
        lines(ROW, {"text": "x"}),
        [":2: is text, the rows before it are alpaca", "two files"],
        {},
    ),
    "two shapes at once": (
        "my.jsonl",
        lines(ROW | {"messages": TURNS}),
        ["is chat and alpaca at once; choose one: data.format: chat"],
        {},
    ),
    "two lists of turns": (
        "my.jsonl",
        lines({"messages": TURNS, "conversations": TURNS}),
        ["has conversations and messages; ignore one: data.columns: {messages: null}"],
        {},
    ),
    "rows that are lists": (
        "my.json",
        b'[["x", "y"]]',
        ['a row must be a JSON object, found ["x", "y"]'],
        {},
    ),
    "rows that are texts": (
        "my.jsonl",
        b'"x"\n"y"\n',
        [':1: unknown shape: a row must be a JSON object, found "x"'],
        {},
    ),
    "array in an array": (
        "my.json",
        b'[[{"text": "x"}]]',
        ["turn 1 has the keys text; expected from and value, or role and content"],
        {},
    ),
    "no keys": ("my.jsonl", b"{}", ["unknown shape with keys (none)"], {}),
    "other keys": (
        "my.jsonl",
        lines({"question": "q", "answer": "a"}),
        ["unknown shape with keys question, answer", "data.columns: {question: instruction, answer: output}"],
        {},
    ),
    "half of the keys": (
        "my.jsonl",
        lines({"instruction": "q"}),
        ["keys instruction: instruction without output"],
        {},
    ),
    "a thousand keys": (
        "my.jsonl",
        lines({f"key{n}": n for n in range(1000)}),
        ["key0, key1", "key9 ..."],
        {},
    ),
    "key of control characters": ("my.jsonl", lines({"\x1b[2J\ud83d\n": 1}), ["keys \\x1b[2J\\ud83d\\n"], {}),
    "column that is none": (
        "my.jsonl",
        lines({"question": "q", "output": "a"}),
        ["data.columns: {question: instuction}: rows have no instuction here; known: instruction, output"],
        {"columns": {"question": "instuction"}},
    ),
    "two columns made one": (
        "my.jsonl",
        lines({"question": "q", "instruction": "q", "output": "a"}),
        ["has question and instruction, and data.columns makes instruction of both", "{instruction: null}"],
        {"columns": {"question": "instruction"}},
    ),
    "text where chat is asked for": (
        "my.jsonl",
        lines({"text": "x"}),
        ["is pre-training text, data.format=chat is asked for"],
        {"format": "chat"},
    ),
    "another format than asked for": (
        "my.jsonl",
        lines(ROW),
        ["is alpaca, data.format=chat is asked for; leave data.format out"],
        {"format": "chat"},
    ),
    "preferences": (
        "my.jsonl",
        lines({"prompt": "q", "chosen": "a", "rejected": "b"}),
        ["is preference data (chosen and rejected)", "data.columns: {chosen: completion, rejected: null}"],
        {},
    ),
    "preferences of dialogues": (
        "my.jsonl",
        lines({"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}),
        ["is preference data", "is not read here"],
        {},
    ),
    "a bad reply": (
        "my.jsonl",
        lines({"prompt": "q", "completion": "a", "label": False}),
        ["(label: false)", "learn the good ones alone, write data.on_bad_row: skip", "{label: null}"],
        {},
    ),
    "prompts alone": (
        "my.jsonl",
        lines({"prompt": TURNS[:1], "reward_model": {"ground_truth": "三点。"}}),
        ["prompt without a reply; such rows are for reinforcement learning"],
        {},
    ),
    "instances of a task": (
        "my.jsonl",
        lines({"instruction": "q", "instances": [{"input": "", "output": "a"}]}),
        ["jq -c '{instruction} + .instances[]' old > new"],
        {},
    ),
    # turns
    "no assistant turn": (
        "my.jsonl",
        chat(TURNS[0]),
        ["no assistant turn: there is nothing to learn from"],
        {},
    ),
    "no turns": ("my.jsonl", chat(), ["messages is a list without turns; remove the row"], {}),
    "turns are null": (
        "my.jsonl",
        lines({"messages": None}),
        ["messages must be a list of turns, found null"],
        {},
    ),
    "turns are an object": (
        "my.jsonl",
        lines({"messages": TURNS[0]}),
        ['list of turns, found {"role": "user"'],
        {},
    ),
    "turns are text": (
        "my.jsonl",
        lines({"messages": "hello"}),
        ['messages must be a list or an object, found the text "hello"'],
        {},
    ),
    "turns are lists": (
        "my.jsonl",
        lines({"messages": [TURNS]}),
        ['turn 1 must be an object, found [{"role"'],
        {},
    ),
    "turns are texts": ("my.jsonl", chat("q", "a"), ['turn 1 must be an object, found "q"'], {}),
    "other keys of a turn": (
        "my.jsonl",
        chat({"speaker": "user", "text": "q"}, {"speaker": "bot", "text": "a"}),
        ["turn 1 has the keys speaker, text", "data.columns: {speaker: role, text: content}"],
        {},
    ),
    "unknown role": (
        "my.jsonl",
        chat(TURNS[0], {"role": "医生", "content": "三点。"}),
        ['turn 2 has role "医生"; known: system, human, user, gpt', "data.roles: {医生: assistant}"],
        {},
    ),
    "role in capitals": (
        "my.jsonl",
        chat({"role": "User", "content": "q"}),
        ["data.roles: {User: user}"],
        {},
    ),
    "role that YAML would change": (
        "my.jsonl",
        chat({"role": "a: b", "content": "q"}),
        ['{"a: b": user}'],
        {},
    ),
    "role is a number": (
        "my.jsonl",
        chat({"role": 0, "content": "q"}),
        ["turn 1 has role 0; known: system"],
        {},
    ),
    "role is null": ("my.jsonl", chat({"role": None, "content": "q"}), ["turn 1 has role null; known"], {}),
    "content is a number": (
        "my.jsonl",
        chat({"role": "user", "content": 3}),
        ["turn 1 (user) must be text, found 3"],
        {},
    ),
    "content is NaN": (
        "my.jsonl",
        chat({"role": "user", "content": float("nan")}),
        ["must be text, found NaN"],
        {},
    ),
    "content is null": (
        "my.jsonl",
        chat({"role": "user", "content": None}),
        ["must be text, found null"],
        {},
    ),
    "content in parts": (
        "my.jsonl",
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}),
        ['turn 1 (user) has a part of type "image_url", and only text is read here; leave such rows out'],
        {},
    ),
    "empty turn": (
        "my.jsonl",
        chat(TURNS[0], {"role": "assistant", "content": " \n"}),
        ["turn 2 (assistant) is empty"],
        {},
    ),
    "late system turn": (
        "my.jsonl",
        chat(*TURNS, {"role": "system", "content": "x"}),
        ["turn 3 is a system turn; only the first may be one"],
        {},
    ),
    "two system texts": (
        "my.jsonl",
        chat({"role": "system", "content": "x"}, *TURNS, system="y"),
        ["has a system text and a system turn; remove one, or ignore the text: data.columns: {system: null}"],
        {},
    ),
    "system is a number": ("my.jsonl", chat(*TURNS, system=0), ["system must be text, found 0"], {}),
    "weight of a turn": (
        "my.jsonl",
        chat(TURNS[0], TURNS[1] | {"weight": -1}),
        ["turn 2 has weight -1; expected 0 or false", "or ignore it: data.columns: {weight: null}"],
        {},
    ),
    "forged end of a turn": (
        "my.jsonl",
        lines({"instruction": "q<|im_end|>", "output": "a"}),
        ["would forge a turn"],
        {},
    ),
    "forged turn in tools": (
        "my.jsonl",
        chat(*TURNS, tools=[{"name": "<|im_start|>"}]),
        ["would forge a turn"],
        {},
    ),
    "forged turn in arguments": ("my.jsonl", call({"a": "<|im_start|>"}), ["would forge a turn"], {}),
    "half a character": (
        "my.jsonl",
        lines(ROW | {"output": "x\ud83d"}),
        ['half a character ("\\ud83d") at 1'],
        {},
    ),
    "half a character in tools": (
        "my.jsonl",
        chat(*TURNS, tools=[{"name": "\ud83d"}]),
        ["the list of tools contains half a character"],
        {},
    ),
    "NUL character": (
        "my.jsonl",
        lines(ROW | {"output": "x\0"}),
        ["turn 2 contains a NUL character at 1; remove it"],
        {},
    ),
    # pairs
    "output is null": ("my.jsonl", lines(ROW | {"output": None}), ["output must be text, found null"], {}),
    "both are null": (
        "my.jsonl",
        lines({"query": None, "response": None}),
        ["query must be text, found null"],
        {},
    ),
    "output is a list": (
        "my.jsonl",
        lines(ROW | {"output": ["a"]}),
        ['output must be text, found ["a"]'],
        {},
    ),
    "input is a list": ("my.jsonl", lines(ROW | {"input": []}), ["input must be text, found []"], {}),
    "history of texts": (
        "my.jsonl",
        lines(ROW | {"history": ["q", "a"]}),
        ['history 1 must be ["what was asked"'],
        {},
    ),
    "history of threes": ("my.jsonl", lines(ROW | {"history": [["q", "a", "b"]]}), ["history 1 must be"], {}),
    "text is empty": ("my.jsonl", lines({"text": ""}), ["text is empty"], {}),
    "text is a number": ("my.jsonl", lines({"text": 3}), ["text must be text, found 3"], {}),
    # tools
    "tools are text": (
        "my.jsonl",
        chat(*TURNS, tools="clock"),
        ['tools must be a list or an object, found the text "clock"'],
        {},
    ),
    "tools are names": ("my.jsonl", chat(*TURNS, tools=["clock"]), ["tools must be a list of objects"], {}),
    "arguments are no JSON": (
        "my.jsonl",
        call("{hour: 3}"),
        [
            'turn 2 (assistant): the arguments of a call must be JSON, found "{hour: 3}", not valid JSON',
            "column 2",
        ],
        {},
    ),
    "arguments are a list": (
        "my.jsonl",
        call("[3]"),
        ["the arguments of a call must be an object, found [3]"],
        {},
    ),
    "arguments of NaN": (
        "my.jsonl",
        call({"hour": float("nan")}),
        ["turn 2 has NaN or Infinity, which is no JSON"],
        {},
    ),
    "call without a name": (
        "my.jsonl",
        chat(TURNS[0], {"role": "assistant", "tool_calls": [{"arguments": {}}]}),
        ['turn 2 (assistant): a call must be {"name": ..., "arguments": {...}}, found {"arguments": {}}'],
        {},
    ),
    "call by a user": (
        "my.jsonl",
        chat(TURNS[0] | {"tool_calls": [{"name": "clock"}]}),
        ["turn 1 (user) has tool_calls, which only an assistant makes"],
        {},
    ),
    "function_call without JSON": (
        "my.jsonl",
        lines({"conversations": [{"from": "function_call", "value": "clock()"}]}),
        ['turn 1 (function_call): a call must be a list or an object, found the text "clock()"'],
        {},
    ),
    "dates in arguments": (
        "my.parquet",
        table(
            messages=[
                [
                    {
                        "role": "assistant",
                        "content": "x",
                        "tool_calls": [
                            {"name": "clock", "arguments": {"at": pa.scalar(0, pa.timestamp("s")).as_py()}}
                        ],
                    }
                ]
            ]
        ),
        ["turn 1: Object of type datetime is not JSON serializable; write it as text"],
        {},
    ),
}


@pytest.fixture
def message(tmp_path, monkeypatch):
    """Return the words in which a config's data are refused."""
    monkeypatch.chdir(tmp_path)

    def message(**data: Any) -> str:
        with pytest.raises(ValueError, match=".") as caught:
            survey(Data(**data))
        text = str(caught.value)
        assert len(text) < 6000
        assert text.encode(), "can be printed"
        return text

    return message


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_clear_words(tmp_path, message, name):
    file, content, words, options = BAD[name]
    (tmp_path / file).write_bytes(content)
    text = message(train=file, **options)
    for part in words:
        assert part in text


def test_there_are_enough_bad_files():
    assert len(BAD) >= 100


def test_places_that_hold_no_rows_are_named(tmp_path, message):
    (tmp_path / "folder" / ".hidden").mkdir(parents=True)
    (tmp_path / "folder" / ".hidden" / "my.jsonl").write_bytes(lines(ROW))
    (tmp_path / "folder" / "notes.txt").write_text("x")
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    nothing = message(train="folder")
    assert nothing.startswith("data.train=folder has no data files (.json, .jsonl, ")
    assert nothing.endswith("; to read its plain texts, name them: data.train: folder/**/*.txt")
    assert message(train="folder/*.jsonl").startswith(
        f"data.train=folder/*.jsonl: no file matches (looked in {tmp_path}"
    )
    assert message(train="no.jsonl") == f"data.train=no.jsonl: no such file (looked for {tmp_path}/no.jsonl)"
    assert message(train="dangling.jsonl").startswith("data.train=dangling.jsonl: no such file")
    assert (
        message(train="pipe.jsonl")
        == "data.train=pipe.jsonl is a pipe or device, not a file; write its rows to one"
    )
    assert message(train="example", eval="no.jsonl").startswith("data.eval=no.jsonl: no such file")
    assert message(train="x" * 5000).endswith("xxx...: File name too long")
    assert message(train="~no-such-user/x").startswith(
        'data.train="~no-such-user/x": Could not determine home'
    )


def test_a_file_whose_name_is_not_utf8_is_refused_before_it_is_shown(tmp_path, message):
    (tmp_path / "folder").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "folder") + "/文.jsonl".encode("gbk"))).write_bytes(lines(ROW))
    assert '/folder/\\udcce\\udcc4.jsonl"; rename it' in message(train=str(tmp_path / "folder"))


def test_a_bad_file_is_named_among_good_ones(tmp_path, message):
    (tmp_path / "a.jsonl").write_bytes(lines(ROW, ROW))
    (tmp_path / "b.jsonl").write_bytes(lines(ROW, {"instruction": "q", "output": ""}))
    assert "1 of 2 rows cannot be trained:\n  b.jsonl:2: turn 2 (assistant) is empty" in message(
        train=["a.jsonl", "b.jsonl"]
    )


def test_roles_of_a_file_are_named_at_once(tmp_path, message):
    turns = [
        [{"from": name, "value": "x"} for name in names] for names in (("Kunde", "bot"), ("Gast", "gpt"))
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"conversations": both} for both in turns)))
    assert "\nall roles at once: data.roles: {Kunde: user, bot: assistant, Gast: user}\n" in message(
        train="a.jsonl"
    )


def test_an_empty_file_is_named_among_good_ones(tmp_path, message):
    (tmp_path / "a.jsonl").write_bytes(lines(ROW))
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    assert message(train=["a.jsonl", "b.jsonl"]) == "data.train=b.jsonl is empty: it has no rows"
    assert message(train="a.jsonl", eval="b.jsonl") == "data.eval=b.jsonl is empty: it has no rows"


def test_bad_rows_are_left_out_when_that_is_asked_for(tmp_path):
    (tmp_path / "my.jsonl").write_bytes(lines(ROW, {"a": 1}, ROW) + b"{")
    assert survey(Data(train=str(tmp_path / "my.jsonl"), on_bad_row="skip")) == (2, 0, 2, [])


TAKEN = {**ROW, "score": float("nan")}
# what looks wrong and is not: name of the file, bytes, what the config says beside it; all hold ROW
ODD: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "mark and JSON": ("my.jsonl", b"\xef\xbb\xbf" + lines(ROW), {}),
    "mark and array": ("my.json", b"\xef\xbb\xbf" + f" [\n{GOOD}\n]\n".encode(), {}),
    "mark on a later line": ("my.jsonl", b"\n\xef\xbb\xbf" + lines(ROW), {}),
    "array of lines' name": ("my.jsonl", f"[{GOOD}]".encode(), {}),
    "lines of an array's name": ("my.json", lines(ROW), {}),
    "no extension": ("my", lines(ROW), {}),
    "capitals": ("MY.CSV", "instruction,output\n几点？,三点。\n".encode(), {}),
    "capitals, compressed": (
        "MY.TSV.GZ",
        gzip.compress("instruction\toutput\n几点？\t三点。\n".encode()),
        {},
    ),
    "compressed without its name": ("my.jsonl", gzip.compress(lines(ROW)), {}),
    "gz of two members": ("my.gz", gzip.compress(GOOD[:9].encode()) + gzip.compress(GOOD[9:].encode()), {}),
    "zst of two frames": ("my.jsonl.zst", zstd(GOOD[:9].encode()) + zstd(GOOD[9:].encode()), {}),
    "zst without its name": ("my.csv", zstd("instruction,output\n几点？,三点。".encode()), {}),
    "parquet of another name": ("my.data", table(instruction=["几点？"], output=["三点。"]), {}),
    "UTF-16": ("my.jsonl", f"{GOOD}\n".encode("utf-16"), {}),
    "UTF-16, big end first": ("my.json", f"\ufeff[{GOOD}]".encode("utf-16-be"), {}),
    "UTF-32": ("my.jsonl", GOOD.encode("utf-32"), {}),
    "UTF-16 csv": ("my.csv", "instruction\toutput\n几点？\t三点。\n".encode("utf-16"), {}),
    "GB18030 csv": ("my.csv", "instruction,output\n几点？,三点。\n".encode("gb18030"), {}),
    "GB18030 csv, compressed": (
        "my.csv.gz",
        gzip.compress("instruction,output\n几点？,三点。".encode("gb18030")),
        {},
    ),
    "GB18030 named": ("my.jsonl", GOOD.encode("gb18030"), {"encoding": "gb18030"}),
    "GB18030 array named": ("my.json", f"[{GOOD}]".encode("gbk"), {"encoding": "GBK"}),
    "Big5 named": ("my.csv", "instruction,output\n幾點？,三點。".encode("big5"), {"encoding": "big5"}),
    "a mark against what was named": (
        "my.csv",
        "\ufeffinstruction,output\n几点？,三点。".encode(),
        {"encoding": "gb18030"},
    ),
    "UTF-8 named, with a mark": (
        "my.csv",
        "\ufeffinstruction,output\n几点？,三点。".encode(),
        {"encoding": "utf-8"},
    ),
    "semicolons": ("my.csv", "instruction;output\r\n几点？;三点。\r\n".encode(), {}),
    "spaces around names": ("my.csv", "\n instruction , output\n几点？,三点。\n".encode(), {}),
    "empty cells": (
        "my.csv",
        "instruction,output,input,history,system,messages\n几点？,三点。,,,,\n".encode(),
        {},
    ),
    "NaN that no one reads": ("my.jsonl", lines(TAKEN), {}),
    "blank lines": ("my.jsonl", b"\n \r\n" + lines(ROW) + b"\n\n", {}),
    "keys that are null": ("my.jsonl", lines(ROW | {"messages": None, "tools": None, "history": None}), {}),
    "class labels": ("my.jsonl", lines(ROW | {"label": 1, "id": 7}), {}),
    "list of turns": ("my.jsonl", lines(TURNS), {}),
    "list of turns, printed": ("my.json", json.dumps(TURNS, indent=2).encode(), {}),
    "list of lists of turns": ("my.json", b"[" + lines(TURNS) + b"]", {}),
    "list of pairs": ("my.json", b"[" + lines([{"human": "几点？", "gpt": "三点。"}]) + b"]", {}),
    "JSON in a text file": ("my.txt", lines(ROW), {}),
    "no end of line, CRLF": ("my.jsonl", b"\r\n" + GOOD.encode() + b"\r", {}),
}


@pytest.mark.parametrize("name", ODD)
def test_a_file_that_only_looks_wrong_is_read(tmp_path, name):
    file, content, options = ODD[name]
    (tmp_path / file).write_bytes(content)
    ((place, row),) = rows_of_side(Data(train=str(tmp_path / file), **options), "train")
    expected = [
        turn["content"].replace("几点", "幾點").replace("三点", "三點") if "Big5" in name else turn["content"]
        for turn in TURNS
    ]
    assert [message["content"] for message in row.messages] == expected
    assert place.startswith(f"{tmp_path / file}:")


def test_a_row_of_five_megabytes_is_read(tmp_path):
    (tmp_path / "my.jsonl").write_bytes(lines(ROW | {"output": "三" * 2_000_000}, ROW))
    assert survey(Data(train=str(tmp_path / "my.jsonl"))) == (2, 0, 0, [])


def test_random_damage_never_ends_in_a_traceback():
    fuzz = runpy.run_path(str(Path(__file__).with_name("fuzz_reader.py")))["fuzz"]
    outcomes = fuzz(seed=1, seconds=2.0)
    assert outcomes["failed"] == 0
    assert outcomes["read"] > 10
    assert outcomes["refused"] > 10
