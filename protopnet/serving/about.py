"""What the documentation of the API says about it as a whole, and of the images sent."""

from typing import Any

_FILE = {"type": "string", "format": "binary"}
_IMAGES = {"type": "array", "items": _FILE, "minItems": 1}

# The body of a request with images, which FastAPI doesn't read itself.
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The image itself, whatever its Content-Type says, or a form with one or several files.",
        "content": {
            "image/jpeg": {"schema": _FILE},
            "image/png": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": _IMAGES}, "required": ["image"]}
            },
        },
    }
}

ABOUT = """
Classifies images by *prototypes*, patches of training images, and shows its reasons: the points of a class are the sum
over all prototypes of **similarity × class connection**, and every answer of `/v1/explain` adds up to its logit.

    curl --data-binary @bird.jpg http://127.0.0.1:8000/v1/predict
    curl -F image=@jay.jpg -F image=@wren.jpg 'http://127.0.0.1:8000/v1/explain?top_classes=2&class=Cardinal&maps=png'
    curl --data-binary @bird.jpg 'http://127.0.0.1:8000/v1/explain?class=Cardinal&contrast=true&perturb=true'

Options are query parameters. Boxes are `[top, left, bottom, right]`, half-open, in pixels of the image as uploaded, after
any EXIF turn. Every response has a header `X-Request-ID`: the one sent, or a new one; the log has it too. Every answer
that isn't a success has one shape: `{"error": {"code": …, "message": …, "request_id": …}}`.
"""
