"""Two tiny tasks in scripts without spaces, Chinese and Thai: the two classes of `tasks.py`, in six frames each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from making.tasks import write_jsonl

LABELS = ("weather", "food")
WORDS = {
    "chinese": (["下雨", "晴天", "暴风", "大雪", "多云", "起雾"], ["面汤", "面包", "奶酪", "苹果", "米饭", "蛋糕"]),
    "thai": (["ฝน", "แดด", "พายุ", "ลม", "เมฆ", "หิมะ"], ["ซุป", "ขนมปัง", "เนย", "แอปเปิล", "ข้าว", "เค้ก"]),
}
FRAMES = {
    "chinese": ["今天这里有{}。", "我们又看到{}了！", "这次没有{}", "城里到处都是{}", "我很喜欢{}", "好多{}和{}啊"],
    "thai": ["วันนี้มี{}ที่นี่", "เราเห็น{}อีกแล้ว", "คราวนี้ไม่มี{}", "ทั่วเมืองมี{}", "ฉันชอบ{}มาก", "{}และ{}เยอะมาก"],
}


def rows(language: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    """`count` rows of the two classes in turn, all different as long as count + start <= 72."""
    out = []
    for i in range(start, start + count):
        some, j = WORDS[language][i % 2], i // 2
        out.append({"text": FRAMES[language][j // 6 % 6].format(some[j % 6], some[(j + 1) % 6]), "label": LABELS[i % 2]})
    return out


def write_task(folder: Path, language: str) -> Path:
    """36 training, 12 validation and 24 test rows."""
    for name, count, start in (("train", 36, 0), ("validation", 12, 36), ("test", 24, 48)):
        write_jsonl(folder / f"{name}.jsonl", rows(language, count, start))
    return folder
