"""The photos: dropped, looked at, cropped, masked and described."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from dreamloom.core.errors import DreamLoomError, PhotoError
from dreamloom.data.examples import examples_folder
from dreamloom.studio.context import (
    go_to,
    not_found,
    read_body,
    read_form,
    refuse,
    render,
    studio_of,
)
from dreamloom.studio.photo_faces import ask_for_faces, resolution_of
from dreamloom.studio.photo_sets import MOST_PHOTO_BYTES, PhotoSetFolder
from dreamloom.studio.words import say

_MOST_SMALL_BYTES = 100_000
_MOST_MASK_BYTES = 20 * 2**20


def _find(request: Request) -> PhotoSetFolder | None:
    return studio_of(request).photo_sets.find(request.path_params["set"])


def _find_photo(request: Request) -> tuple[PhotoSetFolder, str] | None:
    photos = _find(request)
    name = request.path_params["photo"] + ".png"
    return (photos, name) if photos and photos.path(name) else None


def list_sets(request: Request) -> Response:
    """All sets of photos."""
    return render(request, "photos.html", sets=list(studio_of(request).photo_sets))


async def make_set(request: Request) -> Response:
    """Make an empty set."""
    title = (await read_form(request)).get("title", "").strip()
    made = studio_of(request).photo_sets.make(title or say("photos.my_photos"))
    return go_to(f"/photos/{made.id}")


_EXAMPLES = {"rraj": "photos.example", "pixel-art": "photos.example_style"}


async def make_example(request: Request) -> Response:
    """Make a set of the example pictures, to try everything with: a person, or a style."""
    wanted = (await read_form(request)).get("name", "rraj")
    if wanted not in _EXAMPLES:
        return not_found()
    made = studio_of(request).photo_sets.make(say(_EXAMPLES[wanted]))
    made.note_drawn()
    await asyncio.to_thread(_fill, made, examples_folder() / wanted)
    return go_to(f"/photos/{made.id}")


def _fill(photos: PhotoSetFolder, folder: Path) -> None:
    for file in sorted(path for path in folder.iterdir() if path.suffix in {".jpg", ".png"}):
        name = photos.store(file.read_bytes(), file.name)
        caption = file.with_suffix(".txt")
        if caption.is_file():
            photos.write_caption(name, caption.read_text(encoding="utf-8"))


def show_set(request: Request) -> Response:
    """A set: its photos, and where more are dropped."""
    photos = _find(request)
    if photos is None:
        return not_found()
    return render(request, "photo_set.html", photos=photos, base=_base_of(request, photos))


async def show_check(request: Request) -> Response:
    """What is wrong with each photo and with the set, in words."""
    photos = _find(request)
    if photos is None:
        return not_found()
    base = _base_of(request, photos)
    side = resolution_of(base)
    check = await asyncio.to_thread(photos.check, side)
    faces = None
    if check and "faces" in request.query_params:
        faces = await ask_for_faces(studio_of(request), photos, base)
    return render(
        request,
        "parts/photo_check.html",
        photos=photos,
        check=check,
        by_name={one.file: one for one in check.photos} if check else {},
        side=side,
        base=base,
        faces=faces,
        boxes=photos.boxes(),
        sizes={name: photos.size(name) for name in photos.names()},
    )


async def show_face(request: Request) -> Response:
    """Where the face of one photo is, for its editor."""
    found = _find_photo(request)
    if found is None:
        return not_found()
    photos, name = found
    faces = await ask_for_faces(studio_of(request), photos, _base_of(request, photos))
    seen = faces.by_name.get(name)
    return render(request, "parts/photo_face.html", faces=faces, seen=seen)


def _base_of(request: Request, photos: PhotoSetFolder) -> str:
    """Say for which base model photos are looked at: the one that is named, or the set's own."""
    given = request.query_params.get("base", "")
    return given if given in {"picturebook", "sdxl"} else photos.base


async def put_photo(request: Request) -> Response:
    """Store a photo: its bytes are the body, its name stands in a header and names nothing."""
    photos = _find(request)
    if photos is None:
        return not_found()
    body = await read_body(request, MOST_PHOTO_BYTES)
    if body is None:
        return refuse(say("photos.too_many_bytes", most=MOST_PHOTO_BYTES // 2**20), 413)
    told = unquote(request.headers.get("x-file-name", ""))
    try:
        name = await asyncio.to_thread(photos.store, body, told)
    except PhotoError as error:
        return refuse(str(error), 422)
    return JSONResponse({"name": name}, 201)


def delete_photo(request: Request) -> Response:
    """Remove a photo."""
    found = _find_photo(request)
    if found is None:
        return not_found()
    found[0].remove(found[1])
    return Response(status_code=204)


def delete_set(request: Request) -> Response:
    """Remove a set with all its photos."""
    photos = _find(request)
    if photos is None:
        return not_found()
    studio_of(request).photo_sets.remove(photos)
    return go_to("/photos")


def thumbnail(request: Request) -> Response:
    """A small picture of a photo."""
    found = _find_photo(request)
    file = found[0].thumbnail(found[1]) if found else None
    return FileResponse(file) if file else not_found()


def whole(request: Request) -> Response:
    """A photo as it is taught from."""
    found = _find_photo(request)
    path = found[0].path(found[1]) if found else None
    return FileResponse(path) if path else not_found()


def edit(request: Request) -> Response:
    """The page on which a photo is cropped, masked and described."""
    found = _find_photo(request)
    if found is None:
        return not_found()
    photos, name = found
    width, height = photos.size(name)
    return render(
        request,
        "photo.html",
        photos=photos,
        name=name,
        stem=name.removesuffix(".png"),
        width=width,
        height=height,
        box=photos.boxes().get(name),
        names=photos.names(),
    )


async def put_box(request: Request) -> Response:
    """Say what crops must keep; an empty body leaves it open."""
    found = _find_photo(request)
    body = await read_body(request, _MOST_SMALL_BYTES)
    if found is None or body is None:
        return not_found()
    try:
        box = json.loads(body) if body.strip() else None
        numbers = None if box is None else [float(value) for value in box]
        if numbers is not None and len(numbers) != 4:
            raise ValueError
    except (ValueError, TypeError, OverflowError, RecursionError):
        return refuse(say("photos.box_numbers"), 422)
    return _answer(lambda: found[0].write_box(found[1], numbers))


async def put_caption(request: Request) -> Response:
    """Give a photo a caption."""
    found = _find_photo(request)
    body = await read_body(request, _MOST_SMALL_BYTES)
    if found is None or body is None:
        return not_found()
    text = body.decode("utf-8", "replace")
    return _answer(lambda: found[0].write_caption(found[1], text))


async def put_mask(request: Request) -> Response:
    """Give a photo a mask; an empty body takes it away."""
    found = _find_photo(request)
    if found is None:
        return not_found()
    body = await read_body(request, _MOST_MASK_BYTES)
    if body is None:
        return refuse(say("photos.too_many_bytes", most=_MOST_MASK_BYTES // 2**20), 413)
    return _answer(lambda: found[0].write_mask(found[1], body or None))


def get_mask(request: Request) -> Response:
    """A photo's mask."""
    found = _find_photo(request)
    file = found[0].mask(found[1]) if found else None
    return FileResponse(file) if file else not_found()


def _answer(write: object) -> Response:
    assert callable(write)
    try:
        write()
    except DreamLoomError as error:
        return refuse(str(error), 422)
    return Response(status_code=204)


ROUTES = [
    Route("/photos", list_sets),
    Route("/photos", make_set, methods=["POST"]),
    Route("/photos/example", make_example, methods=["POST"]),
    Route("/photos/{set}", show_set),
    Route("/photos/{set}/delete", delete_set, methods=["POST"]),
    Route("/photos/{set}/check", show_check),
    Route("/photos/{set}/files", put_photo, methods=["PUT"]),
    Route("/photos/{set}/{photo}", edit),
    Route("/photos/{set}/{photo}", delete_photo, methods=["DELETE"]),
    Route("/photos/{set}/{photo}/thumb", thumbnail),
    Route("/photos/{set}/{photo}/whole", whole),
    Route("/photos/{set}/{photo}/face", show_face),
    Route("/photos/{set}/{photo}/box", put_box, methods=["PUT"]),
    Route("/photos/{set}/{photo}/caption", put_caption, methods=["PUT"]),
    Route("/photos/{set}/{photo}/mask", get_mask),
    Route("/photos/{set}/{photo}/mask", put_mask, methods=["PUT"]),
]
