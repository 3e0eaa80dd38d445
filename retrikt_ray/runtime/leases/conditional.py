"""Requests to S3 with a condition: an object is written or deleted only if it is still the one that was read."""

from __future__ import annotations

import time
from typing import Any

import fsspec.asyn

from retrikt_ray.runtime.folders import Folder

CONFLICT_PAUSE_S = 0.1  # while another conditional request for the same object is under way


class Changed(Exception):
    """An object is not the one that was read."""


def place(folder: Folder, name: str) -> tuple[Any, dict[str, str]]:
    """The client, and where the object is for it."""
    fs, path = folder.place(name)
    bucket, _, key = path.partition("/")
    return fs, {"Bucket": bucket, "Key": key}


def get(folder: Folder, name: str) -> tuple[bytes | None, str | None]:
    """An object and its ETag; None where there is none."""
    fs, where = place(folder, name)

    async def read() -> tuple[bytes, str]:
        found = await fs._call_s3("get_object", **where)  # cat_file, which is public, does not tell the ETag
        async with found["Body"] as body:
            return await body.read(), found["ETag"]

    try:
        return fsspec.asyn.sync(fs.loop, read)
    except FileNotFoundError:
        return None, None


def put(folder: Folder, name: str, data: bytes, tag: str | None) -> str:
    """Write an object in the place of the one with this ETag (None: of none). Its ETag. Raises Changed, and writes nothing, where another is there."""
    fs, where = place(folder, name)
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    while True:
        try:
            return str(fs.call_s3("put_object", **where, Body=data, **condition)["ETag"])
        except OSError as error:
            if status(error) == 409:
                time.sleep(CONFLICT_PAUSE_S)
                continue
            if status(error) not in ((412,) if tag is None else (404, 412)):
                raise
            there, found = get(folder, name)
            if there == data and found is not None:  # the client sent it twice, since the first answer was lost
                return found
            raise Changed from None


def delete(folder: Folder, name: str, tag: str | None) -> None:
    """Delete the object with this ETag, if it is there. Raises Changed where another is."""
    if tag is None:
        return
    fs, where = place(folder, name)
    try:
        fs.call_s3("delete_object", **where, IfMatch=tag)
    except OSError as error:
        if status(error) == 412:
            raise Changed from None
        if status(error) != 404:
            raise


def status(error: OSError) -> int | None:
    """The HTTP status that an error of the client came from."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
