import math
import warnings

import h5py
import numpy as np
import pytest
import trimesh
from plyfile import PlyData, PlyElement
from scipy import stats

from shared.errors import InputError
from shared.io import points as module
from shared.io.points import PALETTE, SUFFIXES, list_points, picture_of_clouds, read_points, write_ply

RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(40, 3)).astype(np.float32)
RGB = RNG.integers(0, 256, (40, 3)).astype(np.uint8)
NORMALS = (XYZ / np.linalg.norm(XYZ, axis=1, keepdims=True)).astype(np.float32)
LABEL = RNG.integers(0, 7, 40)


def table(path, *columns, header="", delimiter=" "):
    np.savetxt(path, np.column_stack(columns), fmt="%.9g", delimiter=delimiter, header=header, comments="")
    return path


def same(first, second):
    return first.dtype == second.dtype and np.array_equal(first, second)


@pytest.mark.parametrize("suffix", [".xyz", ".txt", ".pts", ".asc", ".csv"])
@pytest.mark.parametrize("delimiter", [" ", ",", ";", "\t", ", "])
def test_text_of_three_columns(tmp_path, suffix, delimiter):
    cloud = read_points(table(tmp_path / f"a{suffix}", XYZ, delimiter=delimiter))
    assert same(cloud.xyz, XYZ)
    assert cloud.extra == {}
    assert not cloud.is_mesh
    assert len(cloud) == 40


def test_columns_without_names_are_known_by_their_values(tmp_path):
    def extra(*columns, suffix=".txt"):
        return read_points(table(tmp_path / f"a{suffix}", XYZ, *columns)).extra

    assert same(extra(RGB)["rgb"], RGB)
    assert same(extra(NORMALS)["normals"], NORMALS)
    # S3DIS as converted, ShapeNetPart, scans with both
    found = extra(RGB, LABEL)
    assert list(found) == ["rgb", "label"]
    assert same(found["label"], LABEL)
    found = extra(NORMALS, LABEL)
    assert list(found) == ["normals", "label"]
    assert same(extra(NORMALS, RGB)["rgb"], RGB)
    assert same(extra(RGB, NORMALS)["normals"], NORMALS)
    odd = XYZ[:, :2] * 3
    found = extra(RGB, odd)
    assert list(found) == ["rgb", "column_6", "column_7"]
    assert same(found["column_7"], odd[:, 1])
    intensity = RNG.integers(-2000, 2000, 40)
    found = extra(intensity, RGB, suffix=".pts")
    assert same(found["intensity"], intensity.astype(np.float32))
    assert same(found["rgb"], RGB)


def test_a_line_of_names_decides_over_values(tmp_path):
    path = table(tmp_path / "a.csv", LABEL, XYZ[:, ::-1], RGB, header='"Label","z","y","X",r,g,b', delimiter=",")
    cloud = read_points(path)
    assert same(cloud.xyz, XYZ)
    assert same(cloud.extra["label"], LABEL)
    assert same(cloud.extra["rgb"], RGB)
    # as CloudCompare writes it
    path = table(tmp_path / "b.asc", XYZ, XYZ[:, 0], header="//X Y Z Scalar_field")
    assert same(read_points(path).extra["scalar_field"], XYZ[:, 0])


def test_comments_counts_and_empty_lines_are_no_points(tmp_path):
    path = tmp_path / "a.pts"
    path.write_text("# a scan\n\n2\n1 2 3 # first\n\n4 5 6\n\n")
    assert read_points(path).xyz.tolist() == [[1, 2, 3], [4, 5, 6]]
    path.write_bytes("\ufeffpoints of a chair\r\n1 2 3\r\n4 5 6\r\n".encode())
    assert read_points(path).xyz.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_ply_as_plyfile_writes_it(tmp_path, text, order):
    kinds = [(n, "f4") for n in ("x", "y", "z", "nx", "ny", "nz")] + [(n, "u1") for n in ("red", "green", "blue")]
    rows = np.empty(40, [*kinds, ("scalar_Label", "f4"), ("quality", "f8")])
    for names, values in (("xyz", XYZ), (("nx", "ny", "nz"), NORMALS), (("red", "green", "blue"), RGB)):
        for i, name in enumerate(names):
            rows[name] = values[:, i]
    rows["scalar_Label"], rows["quality"] = LABEL, XYZ[:, 0]
    PlyData([PlyElement.describe(rows, "vertex")], text, order).write(tmp_path / "a.ply")
    cloud = read_points(tmp_path / "a.ply")
    assert np.allclose(cloud.xyz, XYZ, rtol=1e-6)
    assert np.allclose(cloud.extra["normals"], NORMALS, rtol=1e-6)
    assert same(cloud.extra["rgb"], RGB)
    assert same(cloud.extra["label"], LABEL)
    assert set(cloud.extra) == {"normals", "rgb", "label", "quality"}
    assert not cloud.is_mesh


def test_labelled_ply_comes_back_and_reads_elsewhere(tmp_path):
    label = LABEL - 1
    write_ply(tmp_path / "new" / "a.ply", XYZ, label=label, scalars={"score": XYZ[:, 1]})
    cloud = read_points(tmp_path / "new" / "a.ply")
    assert same(cloud.xyz, XYZ)
    assert same(cloud.extra["label"], label)
    assert same(cloud.extra["score"], XYZ[:, 1])
    assert [tuple(c) for c in cloud.extra["rgb"]] == [
        (200, 200, 200) if number < 0 else tuple(PALETTE[number]) for number in label
    ]
    written = PlyData.read(tmp_path / "new" / "a.ply")
    assert written.byte_order == "<"
    assert not written.text
    names = ("x", "y", "z", "red", "green", "blue", "label", "score")
    assert [p.name for p in written["vertex"].properties] == list(names)
    assert written["vertex"]["label"].dtype == np.int32
    other = trimesh.load(tmp_path / "new" / "a.ply")
    assert np.array_equal(other.vertices, XYZ)
    write_ply(tmp_path / "b.ply", XYZ, rgb=RGB, label=label)
    assert same(read_points(tmp_path / "b.ply").extra["rgb"], RGB)


def test_colours_of_labels_differ():
    assert len({tuple(color) for color in PALETTE}) == len(PALETTE) >= 16
    distance = np.linalg.norm(PALETTE[:, None].astype(float) - PALETTE[None], axis=2)
    assert distance[~np.eye(len(PALETTE), dtype=bool)].min() > 40


def test_a_ply_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"\.ply"):
        write_ply(tmp_path / "a.xyz", XYZ)
    with pytest.raises(InputError, match="finite"):
        write_ply(tmp_path / "a.ply", XYZ * np.nan)
    with pytest.raises(InputError, match="no points"):
        write_ply(tmp_path / "a.ply", XYZ[:0])
    for wrong in (
        {"rgb": RGB.astype(float)},
        {"rgb": RGB[:3]},
        {"label": LABEL[:3]},
        {"label": LABEL * 0.5},
        {"scalars": {"x": LABEL}},
        {"scalars": {"two words": LABEL}},
        {"scalars": {"short": LABEL[:2]}},
    ):
        with pytest.raises(ValueError):
            write_ply(tmp_path / "a.ply", XYZ, **wrong)
    with pytest.raises(ValueError):
        write_ply(tmp_path / "a.ply", XYZ.T)
    assert not list(tmp_path.iterdir())


def test_arrays_of_one_cloud(tmp_path):
    np.save(tmp_path / "a.npy", np.column_stack([XYZ, RGB, LABEL]))
    cloud = read_points(tmp_path / "a.npy")
    assert same(cloud.xyz, XYZ)
    assert same(cloud.extra["rgb"], RGB)
    assert same(cloud.extra["label"], LABEL)
    np.savez(tmp_path / "a.npz", points=XYZ.astype(np.float64), colors=RGB / 255, labels=LABEL, name="chair", a=[1, 2])
    cloud = read_points(tmp_path / "a.npz")
    assert same(cloud.xyz, XYZ)
    assert same(cloud.extra["rgb"], RGB)
    assert same(cloud.extra["label"], LABEL)
    assert set(cloud.extra) == {"rgb", "label"}
    np.savez(tmp_path / "b.npz", anything=XYZ)
    assert same(read_points(tmp_path / "b.npz").xyz, XYZ)
    (2 * XYZ).astype("<f4").tofile(tmp_path / "c.bin")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["xyz"], file["normals"], file["text"] = XYZ, NORMALS, "a chair"
    assert same(read_points(tmp_path / "a.h5").extra["normals"], NORMALS)


def test_files_of_many_clouds_need_an_index(tmp_path):
    many = RNG.normal(size=(5, 40, 3)).astype(np.float32)
    mask = RNG.integers(0, 2, (5, 40))
    # as ScanObjectNN
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"], file["label"], file["mask"] = many, np.arange(5), mask
    np.save(tmp_path / "a.npy", many)
    for name in ("a.h5", "a.npy"):
        for index in (0, 3):
            assert same(read_points(tmp_path / name, index=index).xyz, many[index])
        with pytest.raises(InputError, match=r"holds 5 clouds; choose one with index=0 \.\. 4"):
            read_points(tmp_path / name)
        for index in (5, -1):
            with pytest.raises(InputError, match="counted from 0"):
                read_points(tmp_path / name, index=index)
    assert read_points(tmp_path / "a.h5", index=3).extra["mask"].tolist() == mask[3].tolist()
    assert set(read_points(tmp_path / "a.h5", index=3).extra) == {"mask"}
    np.save(tmp_path / "one.npy", many[:1])
    assert same(read_points(tmp_path / "one.npy").xyz, many[0])


def test_kitti_scan(tmp_path):
    scan = np.column_stack([XYZ, RNG.random(40)]).astype("<f4")
    scan.tofile(tmp_path / "000000.bin")
    cloud = read_points(tmp_path / "000000.bin")
    assert same(cloud.xyz, XYZ)
    assert same(cloud.extra["intensity"], scan[:, 3])
    (tmp_path / "cut.bin").write_bytes(scan.tobytes()[:-3])
    with pytest.raises(InputError, match="637 bytes"):
        read_points(tmp_path / "cut.bin")


def test_rows_of_three_and_six_numbers(tmp_path):
    XYZ.tofile(tmp_path / "a.bin")
    cloud = read_points(tmp_path / "a.bin", bin_columns=3)
    assert same(cloud.xyz, XYZ)
    assert cloud.extra == {}
    # colours are up to 255 in ScanNet's files, up to 1 in SUN RGB-D's
    for colors in (RGB.astype("<f4"), (RGB / 255).astype("<f4")):
        np.column_stack([XYZ, colors]).astype("<f4").tofile(tmp_path / "b.bin")
        cloud = read_points(tmp_path / "b.bin", bin_columns=6)
        assert same(cloud.xyz, XYZ)
        assert list(cloud.extra) == ["rgb"]
        assert same(cloud.extra["rgb"], RGB)
    XYZ[:39].tofile(tmp_path / "c.bin")
    with pytest.raises(InputError, match=r"468 bytes.* \(x, y, z, red, .* again, or say bin_columns=3$"):
        read_points(tmp_path / "c.bin", bin_columns=6)
    with pytest.raises(InputError, match="bin_columns is one of 3, 4, 6, not 5"):
        read_points(tmp_path / "a.bin", bin_columns=5)


def an_odd_mesh():
    """A box and a sphere far from it, of unequal areas."""
    box = trimesh.creation.box((1, 2, 3))
    ball = trimesh.creation.icosphere(3, 0.7)
    return box, ball.apply_translation((5, 0, 0))


@pytest.mark.parametrize("suffix", ["ply", "off", "obj", "stl", "ascii.stl", "ascii.ply"])
def test_meshes_are_sampled_by_area(tmp_path, suffix):
    box, ball = an_odd_mesh()
    mesh = trimesh.util.concatenate([box, ball])
    path = tmp_path / f"a.{suffix}"
    if suffix == "ascii.stl":
        path.write_text(trimesh.exchange.stl.export_stl_ascii(mesh))
    elif suffix == "ascii.ply":
        path.write_bytes(trimesh.exchange.ply.export_ply(mesh, encoding="ascii"))
    else:
        mesh.export(path)
    cloud = read_points(path, 4000, seed=1)
    assert cloud.is_mesh
    assert cloud.xyz.shape == (4000, 3)
    assert cloud.xyz.dtype == np.float32
    # the six faces, by their areas, and the sphere
    on_ball = cloud.xyz[:, 0] > 3
    on_box = cloud.xyz[~on_ball] / (0.5, 1, 1.5)
    assert np.abs(np.abs(on_box).max(1) - 1).max() < 1e-5
    # a polyhedron inside of the sphere
    distance = np.linalg.norm(cloud.xyz[on_ball] - (5, 0, 0), axis=1)
    assert 0.69 < distance.min() < distance.max() < 0.7 + 1e-5
    face = np.abs(on_box).argmax(1) * 2 + (np.take_along_axis(on_box, np.abs(on_box).argmax(1)[:, None], 1)[:, 0] > 0)
    seen = [*np.bincount(face, minlength=6), on_ball.sum()]
    areas = np.array([6, 6, 3, 3, 2, 2, ball.area])
    assert stats.chisquare(seen, areas / areas.sum() * 4000).pvalue > 1e-3
    # even within a face, in both directions
    on_top = on_box[(face == 0) | (face == 1)]
    for axis in (1, 2):
        assert stats.kstest(on_top[:, axis], stats.uniform(-1, 2).cdf).pvalue > 1e-3
    expected = np.zeros_like(on_box)
    expected[np.arange(len(face)), face // 2] = 2 * (face % 2) - 1
    assert np.allclose(cloud.extra["normals"][~on_ball], expected, atol=1e-5)


def test_sampling_is_a_function_of_the_seed(tmp_path):
    an_odd_mesh()[0].export(tmp_path / "a.off")
    first, again, other = (read_points(tmp_path / "a.off", 50, seed=seed).xyz for seed in (3, 3, 4))
    assert same(first, again)
    assert not np.isclose(first, other).all(1).any()
    assert len(read_points(tmp_path / "a.off")) == 10_000


def test_a_cloud_of_more_points_gives_a_subset_in_order(tmp_path):
    path = table(tmp_path / "a.txt", np.arange(120).reshape(40, 3) / 7, LABEL)
    cloud = read_points(path, 10, seed=2)
    whole = read_points(path)
    row = np.searchsorted(whole.xyz[:, 0], cloud.xyz[:, 0])
    assert (np.diff(row) > 0).all()
    assert same(cloud.xyz, whole.xyz[row])
    assert same(cloud.extra["label"], LABEL[row])
    assert len(read_points(path, 41)) == 40
    drawn = [read_points(path, 10, seed=seed).xyz[:, 0] for seed in range(30)]
    assert len(np.unique(np.concatenate(drawn))) == 40


@pytest.mark.parametrize("header", ["OFF\n8 2 0\n", "OFF8 2 0\n", "OFF 8 2 0\n", "OFF\n# by hand\n8 2 0\n"])
def test_off_headers_as_they_are_found(tmp_path, header):
    corners = "".join(f"{x} {y} {z}\n" for z in (0, 1) for y in (0, 1) for x in (0, 1))
    # a quadrangle on z = 0 and a triangle on z = 1 of half its area
    (tmp_path / "a.off").write_text(f"{header}{corners}4 0 1 3 2\n3 4 5 6\n")
    cloud = read_points(tmp_path / "a.off", 900)
    assert set(cloud.xyz[:, 2]) == {0, 1}
    low = cloud.xyz[cloud.xyz[:, 2] == 0]
    assert len(low) == pytest.approx(600, abs=60)
    assert stats.kstest(low[:, 0], "uniform").pvalue > 1e-3
    high = cloud.xyz[cloud.xyz[:, 2] == 1]
    assert (high[:, 0] + high[:, 1]).max() <= 1


def test_polygons_become_fans():
    polygons = np.empty(3, object)
    polygons[:] = [np.array([5, 6, 7]), np.array([0, 1]), np.array([0, 1, 2, 3, 4])]
    assert module.triangulated(polygons).tolist() == [[5, 6, 7], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


def test_ply_of_mixed_polygons(tmp_path):
    vertex = np.array([(0, 0, 0), (2, 0, 0), (2, 1, 0), (0, 1, 0), (1, 3, 0)], [(axis, "f4") for axis in "xyz"])
    faces = np.empty(2, [("vertex_indices", "O")])
    faces["vertex_indices"] = [np.array([0, 1, 2, 3], np.int32), np.array([3, 2, 4], np.int32)]
    elements = [PlyElement.describe(vertex, "vertex"), PlyElement.describe(faces, "face")]
    PlyData(elements).write(tmp_path / "a.ply")
    xyz = read_points(tmp_path / "a.ply", 2000).xyz
    assert (xyz[:, 1] < 1).sum() == pytest.approx(1000, abs=100)
    assert stats.kstest(xyz[xyz[:, 1] < 1, 0], stats.uniform(0, 2).cdf).pvalue > 1e-3


def test_meshes_without_faces_are_points(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n")
    (tmp_path / "a.off").write_text("OFF\n2 0 0\n0 0 0\n1 2 3\n")
    cloud = read_points(tmp_path / "a.obj")
    assert not cloud.is_mesh
    assert sorted(cloud.xyz.tolist()) == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert read_points(tmp_path / "a.off").xyz.tolist() == [[0, 0, 0], [1, 2, 3]]


def test_obj_of_several_objects_with_a_material_that_is_not_there(tmp_path):
    faces = "f 1/1 2/1 3/1\no second\nv 5 0 0\nv 6 0 0\nv 5 1 0\nusemtl red\nf 4 5 6\n"
    (tmp_path / "a.obj").write_text(f"mtllib gone.mtl\no first\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\n{faces}")
    xyz = read_points(tmp_path / "a.obj", 600).xyz
    assert (xyz[:, 0] >= 5).sum() == pytest.approx(300, abs=60)


def refused(path, match, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=match) as caught:
            read_points(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_that_are_no_point_files(tmp_path):
    for suffix in SUFFIXES:
        refused(tmp_path / f"none{suffix}", "does not exist")
        (tmp_path / f"empty{suffix}").write_bytes(b"")
        refused(tmp_path / f"empty{suffix}", "empty")
    refused(tmp_path, "folder")
    (tmp_path / "a.las").write_bytes(b"LASF")
    message = refused(tmp_path / "a.las", "must end in one of")
    assert all(suffix in message for suffix in SUFFIXES)


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".bin"])
def test_garbage_under_any_name(tmp_path, suffix):
    garbage = RNG.bytes(3000) + b"\0"
    (tmp_path / f"a{suffix}").write_bytes(garbage)
    refused(tmp_path / f"a{suffix}", "whatever its name|damaged|no vertices")
    (tmp_path / f"b{suffix}").write_text("it was the best of times, it was the worst of times\nlo and behold\n")
    refused(tmp_path / f"b{suffix}", "no points|not a row|whatever its name|damaged|no vertices")


def test_garbage_as_kitti(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.random.default_rng(1).bytes(1600))
    refused(tmp_path / "a.bin", "finite|beyond")


@pytest.mark.parametrize("suffix", ["ply", "ascii.ply", "off", "stl", "npy", "npz", "h5"])
def test_files_cut_short(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    _, ball = an_odd_mesh()
    if suffix == "h5":
        with h5py.File(path, "w") as file:
            file["data"] = XYZ
    elif suffix.startswith("np"):
        np.savez(path, xyz=XYZ) if suffix == "npz" else np.save(path, XYZ)
    elif suffix == "ascii.ply":
        path.write_bytes(trimesh.exchange.ply.export_ply(ball, encoding="ascii"))
    else:
        ball.export(path)
    assert len(read_points(path))
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.97):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path, "damaged or cut short|copy or download it again")


def test_text_cut_short_or_mixed_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("# scan\n1 2 3\n4 5 6\n7 8\n")
    refused(path, "line 4, has 2 numbers instead of 3")
    path.write_text("1 2 3\n4 five 6\n")
    refused(path, "line 2, is not a row of numbers")
    (tmp_path / "a.pts").write_text("3\n1 2 3\n4 5 6\n")
    refused(tmp_path / "a.pts", "says it has 3 points but holds 2")
    path.write_text("1 2\n3 4\n")
    refused(path, "2 columns; points need three")
    for nothing in ("\n\n", "# only a comment\n", "x y z\n"):
        path.write_text(nothing)
        refused(path, "no points")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".txt", ".npy", ".ply", ".bin", ".h5"])
def test_coordinates_that_are_not_finite(tmp_path, value, suffix):
    xyz = XYZ.copy()
    xyz[[7, 9], 1] = value
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        table(path, xyz)
    elif suffix == ".npy":
        np.save(path, xyz)
    elif suffix == ".bin":
        np.column_stack([xyz, xyz[:, 0]]).astype("<f4").tofile(path)
    elif suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["data"] = xyz
    else:
        rows = np.array([tuple(row) for row in xyz], [(axis, "f4") for axis in "xyz"])
        PlyData([PlyElement.describe(rows, "vertex")]).write(path)
    refused(path, "2 points that are not finite numbers, the first at index 7")


def test_coordinates_too_large_or_too_far_away(tmp_path):
    xyz = XYZ.astype(np.float64)
    xyz[3, 2] = 1e12
    np.save(tmp_path / "a.npy", xyz)
    refused(tmp_path / "a.npy", "1e.12 at index 3")
    np.save(tmp_path / "a.npy", XYZ.astype(np.float64) + 4e6)
    refused(tmp_path / "a.npy", "subtract its centre")
    np.save(tmp_path / "a.npy", 1000 * XYZ.astype(np.float64) + 4e5)
    assert len(read_points(tmp_path / "a.npy")) == 40
    np.save(tmp_path / "a.npy", np.full((4, 3), 3e5))  # one place four times
    assert len(read_points(tmp_path / "a.npy")) == 4


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.zeros((0, 3)), "no points"),
        (np.zeros(12), "shape"),
        (np.zeros((5, 2)), "2 columns"),
        (np.zeros((3, 2000)), "transpose"),
        (np.array([["a", "b", "c"]]), "numbers of shape"),
        (np.zeros((2, 0, 3)), "choose one"),
    ],
)
def test_arrays_that_are_no_clouds(tmp_path, values, match):
    np.save(tmp_path / "a.npy", values)
    refused(tmp_path / "a.npy", match)


def test_archives_without_coordinates_and_with_code(tmp_path):
    np.savez(tmp_path / "a.npz", first=XYZ, second=XYZ)
    refused(tmp_path / "a.npz", "first, second; name the array of coordinates one of xyz, points, data")
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    refused(tmp_path / "a.npy", "damaged")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("nothing")
    refused(tmp_path / "a.h5", "holds nothing")


def test_faces_that_cannot_be_sampled(tmp_path):
    (tmp_path / "a.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n")
    refused(tmp_path / "a.off", "no face with an area")
    (tmp_path / "b.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n")
    refused(tmp_path / "b.off", "damaged|does not hold")
    vertex = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0)], [(axis, "f4") for axis in "xyz"])
    faces = np.array([([0, 1, 9],)], [("vertex_indices", "i4", (3,))])
    PlyData([PlyElement.describe(vertex, "vertex"), PlyElement.describe(faces, "face")]).write(tmp_path / "a.ply")
    refused(tmp_path / "a.ply", "does not hold")
    rows = np.array([(0, 0)], [("x", "f4"), ("y", "f4")])
    PlyData([PlyElement.describe(rows, "vertex")]).write(tmp_path / "b.ply")
    refused(tmp_path / "b.ply", "without z")
    PlyData([PlyElement.describe(vertex[:0], "vertex")]).write(tmp_path / "d.ply")
    refused(tmp_path / "d.ply", "holds no points")
    PlyData([PlyElement.describe(rows, "point")]).write(tmp_path / "c.ply")
    refused(tmp_path / "c.ply", "no element 'vertex'")


def test_wrong_options(tmp_path):
    path = table(tmp_path / "a.txt", XYZ)
    for options, match in (({"num_samples": 0}, "at least 1"), ({"seed": -1}, "seed")):
        with pytest.raises(InputError, match=match):
            read_points(path, **options)
    refused(path, "leave out index=2", index=2)


def test_list_points(tmp_path):
    for name in ("10.ply", "2.ply", "b.XYZ", ".hidden.ply", "notes.md", "c.h5"):
        (tmp_path / name).write_text("1 2 3")
    (tmp_path / "folder.ply").mkdir()
    assert [file.name for file in list_points(tmp_path)] == ["2.ply", "10.ply", "b.XYZ", "c.h5"]
    assert list_points(tmp_path / "2.ply") == [tmp_path / "2.ply"]
    with pytest.raises(InputError, match="holds no point files"):
        list_points(tmp_path / "folder.ply")
    with pytest.raises(InputError, match="does not exist"):
        list_points(tmp_path / "gone")


def test_pictures_have_their_cells_and_titles():
    picture = picture_of_clouds([XYZ] * 5, titles=list("abcde"), columns=3, size=64)
    assert picture.shape == (2 * 84, 3 * 64, 3)
    assert picture.dtype == np.uint8
    assert (picture[84:, 128:] == 255).all()  # no sixth cloud
    cells = [picture[84 * r + 20 : 84 * r + 84, 64 * c : 64 * c + 64] for r in (0, 1) for c in (0, 1, 2)][:5]
    assert all(np.array_equal(cell, cells[0]) for cell in cells)
    titles = [picture[:20, 64 * c : 64 * c + 64] for c in range(3)]
    assert all((title < 128).any() for title in titles)
    assert not np.array_equal(titles[0], titles[1])
    assert picture_of_clouds([XYZ] * 5, size=32).shape == (64, 96, 3)


@pytest.mark.parametrize("up", ["y", "z"])
def test_pictures_show_up_above_and_near_before_far(up):
    def at(right, above, front):
        return (right, above, front) if up == "y" else (right, -front, above)

    colors = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), *2 * [(200, 200, 200)]], np.uint8)
    # the viewer stands in front: above, to the right, and one behind the other
    places = [at(0, 1, 0), at(1, 0, 0), at(0, 0, -1), at(0, 0, 1), at(0, -1, 0), at(-1, 0, 0)]
    cloud = np.array(places, float)
    picture = picture_of_clouds([cloud], [colors], size=101, up=up, azimuth=0, elevation=0).astype(int)

    def center(channels):
        others = [c for c in range(3) if c not in channels]
        mask = (picture[..., others].max(2) < picture[..., channels].min(2) - 20) & (picture[..., others].max(2) < 250)
        rows, columns = np.nonzero(mask)
        return rows.mean(), columns.mean()

    row, column = center([0])
    assert row < 15
    assert column == pytest.approx(50, abs=1)
    row, column = center([1])
    assert row == pytest.approx(50, abs=1)
    assert column > 85
    assert picture[50, 50].tolist() == [200, 200, 0]  # near: full colour, over the blue one
    # from behind the blue one is nearest
    assert picture_of_clouds([cloud], [colors], size=101, up=up, azimuth=180, elevation=0)[50, 50].tolist() == [
        0,
        0,
        200,
    ]
    # from the right the green one is nearest
    assert picture_of_clouds([cloud], [colors], size=101, up=up, azimuth=90, elevation=0)[50, 50].tolist() == [
        0,
        200,
        0,
    ]
    # from above the red one is
    assert picture_of_clouds([cloud], [colors], size=101, up=up, azimuth=0, elevation=90)[50, 50].tolist() == [
        200,
        0,
        0,
    ]


def test_what_is_far_away_is_pale_and_small():
    cloud = np.array([(-0.4, 0, 1), (0.4, 0, -1)])
    picture = picture_of_clouds([cloud], [(0, 0, 0)], size=101, azimuth=0, elevation=0)[50, :, 0]
    near, far = (np.flatnonzero(part < 255).mean() for part in (picture[:50], np.r_[[255] * 50, picture[50:]]))
    assert 50 - near > 1.3 * (far - 50) > 0
    assert picture.min() == picture[round(near)] == 0
    assert picture[round(far)] == 178  # 255 · 0.7


def test_pictures_take_labels_one_colour_or_none():
    label = np.array([0, 1, -1, 21])
    cloud = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], float)
    by_label = picture_of_clouds([cloud], [label], size=50)
    by_color = picture_of_clouds([cloud], [module.colors_of(label)], size=50)
    assert np.array_equal(by_label, by_color)
    assert module.colors_of(label).tolist() == [*PALETTE[:2].tolist(), [200, 200, 200], PALETTE[1].tolist()]
    assert (picture_of_clouds([cloud], [(0, 0, 0)], size=50).std(2) == 0).all()  # grays
    assert picture_of_clouds([cloud[:1]], size=9).min() < 255


def test_pictures_of_nothing_are_refused():
    for arguments in (([],), ([XYZ[:0]],), ([XYZ[:, :2]],), ([XYZ], [RGB[:4]]), ([XYZ], [(1, 2)]), ([XYZ], [])):
        with pytest.raises(ValueError):
            picture_of_clouds(*arguments)
    with pytest.raises(ValueError):
        picture_of_clouds([XYZ], up="x")


def test_a_scan_of_a_hundred_thousand_points_is_drawn(tmp_path):
    angle = RNG.uniform(0, 2 * math.pi, 100_000)
    cloud = np.stack([np.cos(angle), RNG.uniform(-1, 1, 100_000), np.sin(angle)], 1)
    picture = picture_of_clouds([cloud], size=200)
    assert 0.2 < (picture < 255).any(2).mean() < 0.9
