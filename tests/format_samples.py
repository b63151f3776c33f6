"""Records in the structure of published data sets, with content of our own; pictures are `a.png`, 8 x 8 pixels."""

VISUAL_COT = {
    "question": "What is across from the truck?",
    "answer": "tv",
    "full_answer": "The tv is across from the truck.",
    "image": "a.png",
    "width": 640,
    "height": 354,
    "bboxs": [[343.87, 94.03, 396.81, 126.06], [0, 200, 320, 360]],
    "dataset": "vsr",
    "split": "train",
}
VISUAL_COT_TURNS = {
    "dataset": "docvqa",
    "split": "train",
    "question_id": 138460,
    "image": ["a.png", "a.png###[1, 2, 5, 4]"],
    "conversations": [
        {
            "from": "human",
            "value": "<image>\nWhat is the share of lemons? Please provide the bounding box coordinate of the region "
            "that can help you answer the question better.",
        },
        {"from": "gpt", "value": "[0.125, 0.250, 0.625, 0.500]"},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "8%"},
    ],
}


def clevr_program(*nodes):
    """Nodes as CLEVR has them, of (function, inputs, words)."""
    return [{"inputs": list(i), "function": name, "value_inputs": list(words)} for name, i, words in nodes]


CLEVR = {
    "image_index": 0,
    "program": clevr_program(
        ("scene", [], []),
        ("filter_size", [0], ["large"]),
        ("filter_material", [1], ["metal"]),
        ("unique", [2], []),
        ("relate", [3], ["right"]),
        ("filter_shape", [4], ["sphere"]),
        ("count", [5], []),
    ),
    "question_index": 0,
    "image_filename": "a.png",
    "question_family_index": 12,
    "split": "train",
    "answer": "2",
    "question": "What number of spheres are right of the large metal thing?",
}
CLEVR_SCENES = {
    "info": {"split": "train", "license": "Creative Commons Attribution (CC BY 4.0)"},
    "scenes": [
        {
            "image_index": 0,
            "image_filename": "a.png",
            "split": "train",
            "objects": [
                {
                    "color": color,
                    "size": size,
                    "rotation": 269.8,
                    "shape": shape,
                    "3d_coords": [-1.4, -0.8, 0.7],
                    "material": material,
                    "pixel_coords": [across, 166, 9.5],
                }
                for color, size, shape, material, across in [
                    ("red", "small", "sphere", "rubber", 300),
                    ("gray", "large", "cube", "metal", 100),
                    ("red", "small", "sphere", "metal", 200),
                ]
            ],
            "relationships": {
                "right": [[], [0, 2], [0]],
                "left": [[1, 2], [], [1]],
                "front": [[], [], []],
                "behind": [[], [], []],
            },
            "directions": {"right": [0.65, 0.75, 0.0]},
        }
    ],
}
