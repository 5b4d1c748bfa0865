"""Contact sheets: patches stand where they belong, labels get room, and the file is the picture."""
import numpy as np
from PIL import Image

from evaluation.contact_sheet import contact_sheet, save_png

RED, BLUE = np.full((8, 8, 3), (255, 0, 0), np.uint8), np.full((16, 16, 3), (0, 0, 255), np.uint8)


def test_patches_stand_at_their_places_with_the_gap_between_them():
    sheet = contact_sheet([[RED, BLUE], [BLUE]], gap_px=2)
    assert sheet.shape == (2 + 2 * 18, 2 + 2 * 18, 3)
    assert (sheet[2:18, 2:18] == (255, 0, 0)).all()          # the small patch is enlarged to the cell
    assert (sheet[2:18, 20:36] == (0, 0, 255)).all()
    assert (sheet[20:36, 2:18] == (0, 0, 255)).all()
    assert (sheet[20:, 18:] == 255).all()                    # a shorter row leaves white


def test_labels_get_room_of_their_own():
    plain, labelled = contact_sheet([[RED]]), contact_sheet([[RED]], row_labels=["cluster 3"], column_labels=["a long heading"])
    assert labelled.shape[0] > plain.shape[0] and labelled.shape[1] > plain.shape[1]
    assert (labelled[-10:-2, -10:-2] == (255, 0, 0)).all()
    assert labelled[:-10, :].min() < 100                     # ink above the patch


def test_a_sheet_survives_the_disk(tmp_path):
    sheet = contact_sheet([[RED, BLUE]])
    save_png(tmp_path / "sheet.png", sheet)
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == sheet).all()
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
