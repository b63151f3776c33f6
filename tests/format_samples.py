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
EGOPLAN = {
    "sample_id": 115,
    "video_source": "EpicKitchens",
    "video_id": "P01_13",
    "task_goal": "store cereal",
    "question": "Considering the progress shown in the video and my current observation in the last frame, what action "
    "should I take next in order to store cereal?",
    "choice_a": "put box into cupboard",
    "choice_b": "take bag",
    "choice_c": "open cupboard",
    "choice_d": "put bag into box",
    "golden_choice_idx": "A",
    "answer": "put box into cupboard",
    "current_observation_frame": 760,
    "current_observation_basename": "a.png",
    "task_progress_metadata": [
        {"narration_text": "take bag", "start_frame": 36, "stop_frame": 105},
        {"narration_text": "open cupboard", "start_frame": 689, "stop_frame": 760},
    ],
}
EGOPLAN_IT = {
    "sample_id": 39,
    "video_source": "EpicKitchens",
    "video_id": "P07_113",
    "task_goal": "Cut and peel the onion",
    "question": "Considering the progress, what action should I take next in order to cut and peel the onion?",
    "answer": "grab onion",
    "current_observation_frame": 9308,
    "current_observation_basename": "a.png",
    "task_progress_metadata": [{"narration_text": "open drawer", "start_frame": 9162, "stop_frame": 9203}],
    "negative_answers": ["open drawer", "slice onion"],
}
GEOMETRY3K = {
    "id": 7,
    "data_type": "train",
    "problem_text": "Triangle RST is congruent to triangle XYZ. Find y.",
    "compact_text": "Triangle RST is congruent to triangle XYZ . Find y .",
    "choices": ["5", "7.5", "10", "15"],
    "compact_choices": ["5", "7.5", "10", "15"],
    "answer": "B",
    "problem_type_graph": ["Triangle"],
    "problem_type_goal": ["Angle"],
    "folder": ".",
    "logic_form": {
        "text_logic_form": ["Congruent(Triangle(R,S,T),Triangle(X,Y,Z))", "Find(y)"],
        "dissolved_text_logic_form": ["Congruent(Triangle(R,S,T),Triangle(X,Y,Z))", "Find(y)"],
        "diagram_logic_form": [
            "Equals(LengthOf(Line(T, R)), x+21)",
            "Equals(MeasureOf(Angle(T, R, S)), 4y-10)",
            "PointLiesOnLine(Q, Line(R, N))",
        ],
        "line_instances": ["SR", "ST"],
        "point_positions": {"R": [2.0, 56.0]},
        "circle_instances": [""],
    },
}
