"""DICOM files: each of the awkward ones ends in a use or in one clear refusal, which quotes no tag."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest

from cloister_client.encoders import image
from cloister_client.encoders.dicom import mask
from cloister_client.quality import ColumnReport
from cloister_client.site_file import PictureTerms
from cloister_shared.errors import DataRefused
from cloister_shared.schema import ImageFeature
from cloister_simulations.sources.dicom_folder import SYNTAXES, dicom_file

EVERYTHING = PictureTerms(identified=True, captures=True, private_tags=True)
UNITS = (np.arange(40 * 36).reshape(40, 36) - 700).astype(np.int16)
CLEAN = {"PatientIdentityRemoved": "YES"}


def feature(*size, **terms):
    return ImageFeature(name="scan", kind="image", size=size or (8, 8), **terms)


def read(path, wanted=None, allowed=EVERYTHING):
    return image.pixels(path.name, wanted or feature(), path.parent, allowed)


def refusal(path, wanted=None, allowed=EVERYTHING):
    with pytest.raises(DataRefused) as refused:
        read(path, wanted, allowed)
    return refused.value


# --- the awkward files -----------------------------------------------------------------------------------------
NO_PICTURE = "a DICOM object without a picture"
NOT_DICOM = "a file that is not DICOM, or whose beginning is gone"
WHO = "a file that tells who the patient is"
VOLUME = (8, 8, 8)
USED = {
    "CT_small.dcm": ((8, 8), (1, 128, 128), -896, 1167),
    "MR_small.dcm": ((8, 8), (1, 64, 64), 127, 2145),
    "MR_small_RLE.dcm": ((8, 8), (1, 64, 64), 127, 2145),
    "SC_rgb_rle_32bit_2frame.dcm": (VOLUME, (1, 2, 100, 100), 0, 255),
    "examples_overlay.dcm": ((8, 8), (1, 300, 484), 0, 1123),
    "examples_palette.dcm": ((8, 8), (1, 350, 800), 0, 254),
    "examples_rgb_color.dcm": ((8, 8), (1, 240, 320), 0, 255),
    "examples_ybr_color.dcm": (VOLUME, (1, 30, 240, 320), 0, 192),
}
"""Where everything is allowed: size of the plan's, shape, least and greatest value."""
REFUSED = {
    "JPEG-lossy.dcm": ("a picture whose pixels cannot be unpacked", WHO),
    "liver_1frame.dcm": ("a segmentation where the plan wants a picture", WHO),
    "no_meta.dcm": (NOT_DICOM, NOT_DICOM),
    "reportsi.dcm": (NO_PICTURE, NO_PICTURE),
    "rtdose.dcm": ("a dose where the plan wants a picture", WHO),
    "rtplan.dcm": (NO_PICTURE, NO_PICTURE),
    "rtstruct.dcm": (NOT_DICOM, NOT_DICOM),
    "test-SR.dcm": (NO_PICTURE, NO_PICTURE),
    "waveform_ecg.dcm": (NO_PICTURE, NO_PICTURE),
}
"""Where everything is allowed, and where nothing is."""


@pytest.fixture
def samples(data_dir):
    return data_dir("dicom_samples")


def test_every_sample_is_spoken_of(samples):
    assert {path.name for path in samples.glob("*.dcm")} == {*USED, *REFUSED}


@pytest.mark.parametrize("name", USED)
def test_an_awkward_file_is_used(samples, name):
    size, shape, low, high = USED[name]
    found = read(samples / name, feature(*size))
    assert found.shape == shape
    assert found.dtype == np.float32
    assert (float(found.min()), float(found.max())) == pytest.approx((low, high), abs=0.6)
    assert refusal(samples / name, feature(*size), PictureTerms()).said == WHO


@pytest.mark.parametrize("name", REFUSED)
def test_an_awkward_file_is_refused_in_one_sentence(samples, name):
    everything, nothing = REFUSED[name]
    assert refusal(samples / name).said == everything
    assert refusal(samples / name, allowed=PictureTerms()).said == nothing


@pytest.mark.parametrize("name", [*USED, *REFUSED])
def test_no_value_of_a_tag_is_said(samples, name, caplog):
    from pydicom import dcmread

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dcmread(samples / name, force=True, stop_before_pixels=True)
        values = {str(element.value) for element in data.iterall() if element.VR != "SQ"}
    # A word such as "patient" is no secret.
    told = {value for value in values if len(value) > 4 and not value.isspace() and not value.islower()}
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    report = ColumnReport("scan")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for allowed in (PictureTerms(), EVERYTHING):
            for size in ((8, 8), VOLUME):
                image.encode(feature(*size), np.array([name], object), samples, report, allowed)
    said = " ".join([*map(str, report.problems), caplog.text, *(str(one.message) for one in warned)])
    assert report.problems
    assert [value for value in told if value in said] == []


def test_the_same_picture_however_it_is_packed(samples):
    assert np.array_equal(read(samples / "MR_small.dcm"), read(samples / "MR_small_RLE.dcm"))


def test_a_segmentation_is_a_mask(samples):
    drawn = mask(samples / "liver_1frame.dcm", 2, EVERYTHING)
    assert drawn.shape == (1, 512, 512)
    assert set(np.unique(drawn)) == {0.0, 1.0}


# --- what is stored, and what it means -------------------------------------------------------------------------
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_hounsfield_units_however_they_are_stored(tmp_path, syntax, inverted, signed):
    written = dicom_file(UNITS, uid="1.2.3", syntax=syntax, inverted=inverted, signed=signed, **CLEAN)
    (tmp_path / "a.dcm").write_bytes(written)
    found = read(tmp_path / "a.dcm", allowed=PictureTerms())
    assert np.array_equal(found[0], UNITS)


def test_a_window_is_the_plans(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom_file(UNITS, uid="1.2.3", WindowCenter=1, WindowWidth=2, **CLEAN))
    wanted = feature(40, 36, window=(0.0, 400.0))
    found = image.encode(wanted, np.array(["a.dcm"], object), tmp_path, ColumnReport("scan"))
    assert found.reshape(40, 36) == pytest.approx(np.clip(UNITS / 200, -1, 1), abs=1e-6)


def test_grey_as_colour_and_a_file_without_an_ending(tmp_path):
    (tmp_path / "IM0001").write_bytes(dicom_file(UNITS, uid="1.2.3", **CLEAN))
    found = read(tmp_path / "IM0001", feature(channels=3))
    assert found.shape == (3, 40, 36)
    assert np.array_equal(found[0], found[2])


# --- what may be used ------------------------------------------------------------------------------------------
TAGS = [
    ({}, PictureTerms(), None),
    ({"PatientName": "Roe^Jane"}, PictureTerms(), WHO),
    ({"PatientName": "Roe^Jane"}, PictureTerms(identified=True), None),
    ({"PatientName": "Roe^Jane", "PatientIdentityRemoved": "YES"}, PictureTerms(), None),
    ({"PatientID": "12345678"}, PictureTerms(), WHO),
    ({"PatientBirthDate": "19700101"}, PictureTerms(), WHO),
    ({"OperatorsName": "Roe^Rita"}, PictureTerms(), WHO),
    ({"BurnedInAnnotation": "YES", **CLEAN}, EVERYTHING, "a picture with writing in its pixels"),
    ({"RecognizableVisualFeatures": "YES", **CLEAN}, EVERYTHING, "a picture that shows who it is"),
    (
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", **CLEAN},
        PictureTerms(),
        "a capture of a screen or a scan that does not say whether there is writing in it",
    ),
    ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "BurnedInAnnotation": "NO", **CLEAN}, PictureTerms(), None),
    ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", **CLEAN}, PictureTerms(captures=True), None),
]


@pytest.mark.parametrize(("tags", "allowed", "said"), TAGS)
def test_what_the_hospital_allows(tmp_path, tags, allowed, said):
    (tmp_path / "a.dcm").write_bytes(dicom_file(UNITS, uid="1.2.3", **tags))
    if said is None:
        assert read(tmp_path / "a.dcm", allowed=allowed).shape == (1, 40, 36)
    else:
        assert refusal(tmp_path / "a.dcm", allowed=allowed).said == said


@pytest.mark.parametrize("nested", [False, True])
def test_private_tags_need_a_switch(tmp_path, nested):
    from pydicom import dcmread
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    (tmp_path / "a.dcm").write_bytes(dicom_file(UNITS, uid="1.2.3", **CLEAN))
    data = dcmread(tmp_path / "a.dcm")
    holder = data
    if nested:
        holder = Dataset()
        data.ReferencedImageSequence = Sequence([holder])
    holder.private_block(0x0099, "MAKER", create=True).add_new(1, "LO", "Roe^Jane")
    data.save_as(tmp_path / "a.dcm")
    assert refusal(tmp_path / "a.dcm", allowed=PictureTerms()).said.startswith("a file with private tags")
    assert read(tmp_path / "a.dcm", allowed=PictureTerms(private_tags=True)).shape == (1, 40, 36)


def test_a_switch_that_is_on_is_logged(tmp_path, caplog):
    (tmp_path / "a.dcm").write_bytes(dicom_file(UNITS, uid="1.2.3", PatientName="Roe^Jane"))
    cells = np.array(["a.dcm", None], object)
    image.encode(feature(), cells, tmp_path, ColumnReport("scan"), PictureTerms(identified=True))
    assert "allows 1 of scan's pictures to be used though they may tell who the patient is" in caplog.text
    assert "Roe" not in caplog.text


# --- what the plan asks for ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (feature(modality=("MR", "CT"), body_part=("CHEST",)), None),
        (feature(modality=("MR",)), "a picture of another modality than the plan's"),
        (feature(body_part=("HEAD",)), "a picture of another part of the body than the plan's"),
        (feature(*VOLUME), "one slice where the plan wants a volume"),
    ],
)
def test_what_the_plan_asks_for(tmp_path, wanted, said):
    (tmp_path / "a.dcm").write_bytes(dicom_file(UNITS, uid="1.2.3", BodyPartExamined="CHEST", **CLEAN))
    if said:
        assert refusal(tmp_path / "a.dcm", wanted).said == said
    else:
        assert read(tmp_path / "a.dcm", wanted).shape == (1, 40, 36)


def test_a_part_of_the_body_that_is_not_said(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom_file(UNITS, uid="1.2.3", **CLEAN))
    said = "a picture that does not say which part of the body"
    assert refusal(tmp_path / "a.dcm", feature(body_part=("HEAD",))).said == said


@pytest.mark.parametrize("length", [0, 100, 131, 400])
def test_a_file_that_was_cut_off(tmp_path, length):
    (tmp_path / "a.dcm").write_bytes(dicom_file(UNITS, uid="1.2.3", **CLEAN)[:length])
    assert refusal(tmp_path / "a.dcm").said in (NOT_DICOM, NO_PICTURE)


# --- volumes ---------------------------------------------------------------------------------------------------
def series(folder: Path, count=4, **changes):
    """Slices whose names and numbers go against their places; slice ``at`` is all ``at``."""
    folder.mkdir()
    paths = []
    for at in range(count):
        tags = {
            "SeriesInstanceUID": "1.2.9",
            "ImagePositionPatient": [0, 0, 2.5 * at - 100],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "InstanceNumber": count - at,
            **CLEAN,
            **{name: value(at) for name, value in changes.items()},
        }
        path = folder / f"{chr(ord('z') - at)}.dcm"
        path.write_bytes(dicom_file(np.full((6, 5), at, np.int16), uid=f"1.2.3.{at + 1}", **tags))
        paths.append(path)
    return paths


def test_a_series_is_a_volume_in_the_order_of_place(tmp_path):
    series(tmp_path / "scan")
    found = read(tmp_path / "scan", feature(*VOLUME))
    assert found.shape == (1, 4, 6, 5)
    assert found[0, :, 0, 0].tolist() == [0, 1, 2, 3]


def test_slices_without_a_place_are_in_the_order_of_number(tmp_path):
    series(tmp_path / "scan", ImagePositionPatient=lambda at: None)
    assert read(tmp_path / "scan", feature(*VOLUME))[0, :, 0, 0].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ImagePositionPatient": lambda at: [0, 0, 2.5 * (at + (at > 1))]}, "a volume that lacks a slice"),
        ({"ImagePositionPatient": lambda at: [0, 0, 2.5 * min(at, 2)]}, "two slices in one place"),
        ({"SeriesInstanceUID": lambda at: f"1.2.{at}"}, "slices of several series"),
        (
            {"ImagePositionPatient": lambda at: None, "InstanceNumber": lambda at: None},
            "slices that do not say where they lie",
        ),
    ],
)
def test_a_broken_volume_is_refused(tmp_path, changes, said):
    series(tmp_path / "scan", **changes)
    assert refusal(tmp_path / "scan", feature(*VOLUME)).said == said


def test_several_files_are_no_picture(tmp_path):
    series(tmp_path / "scan")
    assert refusal(tmp_path / "scan").said == "several files where the plan wants one picture"


def nested(name, **tags):
    """A data set with one sequence, of one item with these tags."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    inner, outer = Dataset(), Dataset()
    for tag, value in tags.items():
        setattr(inner, tag, value)
    setattr(outer, name, Sequence([inner]))
    return outer


def multiframe(path):
    """One file with three frames, the last one lowest; each with a rescale of its own."""
    from pydicom import dcmread
    from pydicom.sequence import Sequence

    path.write_bytes(dicom_file(np.zeros((6, 5), np.int16), uid="1.2.8", signed=True, **CLEAN))
    data = dcmread(path)
    data.NumberOfFrames = 3
    data.PixelData = np.repeat(np.array([1, 2, 3], "<i2"), 30).tobytes()
    data.SharedFunctionalGroupsSequence = Sequence(
        [nested("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    )
    groups = [nested("PlanePositionSequence", ImagePositionPatient=[0, 0, place]) for place in (-95.0, -97.5, -100.0)]
    for slope, group in enumerate(groups, start=1):
        scaled = nested("PixelValueTransformationSequence", RescaleSlope=slope, RescaleIntercept=10)
        group.PixelValueTransformationSequence = scaled.PixelValueTransformationSequence
    data.PerFrameFunctionalGroupsSequence = Sequence(groups)
    data.save_as(path)


def test_frames_of_one_file_are_rescaled_each_and_put_in_order(tmp_path):
    multiframe(tmp_path / "a.dcm")
    found = read(tmp_path / "a.dcm", feature(*VOLUME), PictureTerms())
    assert found[0, :, 0, 0].tolist() == [3 * 3 + 10, 2 * 2 + 10, 1 * 1 + 10]
    drawn = np.zeros((1, 6, 5))
    drawn[0, 4, 1] = 1
    segmentation(tmp_path / "seg.dcm", drawn, [-95.0])
    put = mask(tmp_path / "seg.dcm", 3, PictureTerms(), [tmp_path / "a.dcm"])
    assert np.argwhere(put[0]).tolist() == [[2, 4, 1]]


def segmentation(path, frames, places):
    """A DICOM-SEG whose frames lie there; slices without a lesion are left out of it, as tools do."""
    from pydicom import dcmread
    from pydicom.pixels.utils import pack_bits
    from pydicom.sequence import Sequence

    path.write_bytes(dicom_file(np.zeros((6, 5), np.int16), uid="1.2.7", **CLEAN))
    data = dcmread(path)
    data.SOPClassUID, data.Modality, data.NumberOfFrames = "1.2.840.10008.5.1.4.1.1.66.4", "SEG", len(frames)
    data.BitsAllocated = data.BitsStored = 1
    data.HighBit = data.PixelRepresentation = 0
    data.PixelData = pack_bits(np.asarray(frames, np.uint8).ravel())
    shared = nested("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence(
        [nested("PlanePositionSequence", ImagePositionPatient=[0, 0, place]) for place in places]
    )
    data.save_as(path)


def test_a_segmentation_is_put_upon_the_slices_it_was_drawn_on(tmp_path):
    paths = series(tmp_path / "scan")
    first, second = np.zeros((2, 6, 5))
    first[1, 2] = second[3, 4] = 1
    segmentation(tmp_path / "seg.dcm", [first, second], [-95.0, -97.5])
    drawn = mask(tmp_path / "seg.dcm", 3, PictureTerms(), paths)
    assert drawn.shape == (1, 4, 6, 5)
    assert np.argwhere(drawn[0]).tolist() == [[1, 3, 4], [2, 1, 2]]
    wanted = feature(4, 6, 5)
    cells, of = np.array(["seg.dcm"], object), np.array(["scan"], object)
    y = image.masks(wanted, cells, np.zeros(1, bool), tmp_path, ColumnReport("m"), PictureTerms(), of)
    assert np.array_equal(y.reshape(4, 6, 5), drawn[0])
    segmentation(tmp_path / "seg.dcm", [first, second], [-95.0, 40.0])
    with pytest.raises(DataRefused, match="a segmentation of another series"):
        mask(tmp_path / "seg.dcm", 3, PictureTerms(), paths)
    with pytest.raises(DataRefused, match="cannot be put upon the volume's"):
        mask(tmp_path / "seg.dcm", 3, PictureTerms())


# --- NIfTI -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_is_turned_the_same_way_whatever_its_axes(tmp_path, ending):
    import nibabel as nib

    values = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)  # right, front, head
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"a{ending}")
    turned = np.diag([-1.0, -1.0, 1.0, 1.0])  # the same organ, stored from left to right and from front to back
    nib.save(nib.Nifti1Image(values[::-1, ::-1], turned), tmp_path / f"b{ending}")
    found = [read(tmp_path / f"{name}{ending}", feature(*VOLUME)) for name in "ab"]
    assert found[0].shape == (1, 4, 3, 2)
    assert np.array_equal(*found)
    assert found[0][0, 0, 0].tolist() == [values[1, 2, 0], values[0, 2, 0]]  # foremost row, from the right


@pytest.mark.parametrize("written", [b"", b"no volume" * 100])
def test_a_broken_nifti_is_refused(tmp_path, written):
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / name).write_bytes(written)
        assert refusal(tmp_path / name, feature(*VOLUME)).said == "a file that is no NIfTI volume"
