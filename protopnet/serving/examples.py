"""Examples in the documentation of the API."""

from typing import Any

REQUEST_ID = "5f2b8c0e-8a4f-4a53-9d0b-3d7b3f6f1c11"

_SCORES = [
    {"class": 3, "class_name": "Blue Jay", "probability": 0.91, "logit": 7.25},
    {"class": 7, "class_name": "Cardinal", "probability": 0.06, "logit": 4.53},
]

PREDICTION: dict[str, Any] = {
    "request_id": REQUEST_ID,
    "model": "9a2b4c6d8e0f",
    "images": [{"file": "jay.jpg", "width": 640, "height": 480, "abstained": False, "classes": _SCORES}],
}

EXPLANATION: dict[str, Any] = {
    "request_id": REQUEST_ID,
    "model": "9a2b4c6d8e0f",
    "images": [
        {
            "file": "jay.jpg",
            "abstained": False,
            "width": 640,
            "height": 480,
            "members": 1,
            "classes": [
                {
                    **_SCORES[0],
                    "own_points": 7.0,
                    "evidence": [
                        {
                            "member": 0,
                            "prototype": 17,
                            "class": 3,
                            "class_name": "Blue Jay",
                            "similarity": 0.95,
                            "connection": 2.0,
                            "points": 1.9,
                            "box": [40, 120, 200, 310],
                            "row": 2,
                            "column": 3,
                            "activation_map": None,
                            "source": {
                                "image_id": 34,
                                "uri": "birds/Blue_Jay/0014.jpg",
                                "sha256": "1edcd2a60c96e6461316f5ffe8c5a75ffd287ba739e0fdd059bdac393ba25d88",
                                "width": 500,
                                "height": 400,
                                "box": [30, 90, 150, 260],
                                "row": 1,
                                "column": 3,
                                "self_similarity": 0.99,
                                "thumbnail": None,
                            },
                        }
                    ],
                    "remainder": {"prototypes": 59, "points": 5.35},
                }
            ],
            "most_similar": [],
            "heat_maps": {},
        }
    ],
}

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

Options are query parameters. Boxes are `[top, left, bottom, right]`, half-open, in pixels of the image as uploaded, after
any EXIF turn. Every response has a header `X-Request-ID`: the one sent, or a new one; the log has it too. Every answer
that isn't a success has one shape: `{"error": {"code": …, "message": …, "request_id": …}}`.
"""
