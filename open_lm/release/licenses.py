"""Licenses that the Model Openness Tool accepts as open, the kinds of components that they fit, and their texts.

Sources: the SPDX license list, revision cca0be7, with the approvals of the Open Source Initiative (OSI) and the
Free Software Foundation (FSF); the tool's list of open-data licenses; OpenMDW-1.0, a license for whole models. The
texts in license_texts/ are those of the licenses' authors, word for word, with {year} and {holder} for the copyright.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from open_lm import storage
from open_lm.errors import ConfigError, join_problems
from open_lm.release import layout
from open_lm.release.components import CODE, DATA, DOCUMENT, KINDS

UNLICENSED = "unlicensed"  # value of a component's license in mof.yml: the component is included without a license

# Approved by OSI or FSF.
_APPROVED_IDS = """
    0BSD AAL AFL-1.1 AFL-1.2 AFL-2.0 AFL-2.1 AFL-3.0 AGPL-1.0 AGPL-3.0 AGPL-3.0-only AGPL-3.0-or-later
    Apache-1.0 Apache-1.1 Apache-2.0 APL-1.0 APSL-1.0 APSL-1.1 APSL-1.2 APSL-2.0 Artistic-1.0 Artistic-1.0-cl8
    Artistic-1.0-Perl Artistic-2.0 BitTorrent-1.1 BlueOak-1.0.0 BSD-1-Clause BSD-2-Clause BSD-2-Clause-FreeBSD
    BSD-2-Clause-NetBSD BSD-2-Clause-Patent BSD-3-Clause BSD-3-Clause-Clear BSD-3-Clause-LBNL BSD-4-Clause
    BSL-1.0 CAL-1.0 CAL-1.0-Combined-Work-Exception CATOSL-1.1 CC-BY-4.0 CC-BY-SA-4.0 CC0-1.0 CDDL-1.0
    CECILL-2.0 CECILL-2.1 CECILL-B CECILL-C CERN-OHL-P-2.0 CERN-OHL-S-2.0 CERN-OHL-W-2.0 ClArtistic CNRI-Python
    Condor-1.1 CPAL-1.0 CPL-1.0 CUA-OPL-1.0 ECL-1.0 ECL-2.0 eCos-2.0 EFL-1.0 EFL-2.0 Entessa EPL-1.0 EPL-2.0
    EUDatagrid EUPL-1.1 EUPL-1.2 Fair Frameworx-1.0 FSFAP FTL GFDL-1.1 GFDL-1.1-only GFDL-1.1-or-later GFDL-1.2
    GFDL-1.2-only GFDL-1.2-or-later GFDL-1.3 GFDL-1.3-only GFDL-1.3-or-later gnuplot GPL-2.0 GPL-2.0+
    GPL-2.0-only GPL-2.0-or-later GPL-3.0 GPL-3.0+ GPL-3.0-only GPL-3.0-or-later GPL-3.0-with-GCC-exception HPND
    ICU IJG iMatix Imlib2 Intel IPA IPL-1.0 ISC Jam LGPL-2.0 LGPL-2.0+ LGPL-2.0-only LGPL-2.0-or-later LGPL-2.1
    LGPL-2.1+ LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0 LGPL-3.0+ LGPL-3.0-only LGPL-3.0-or-later LiLiQ-P-1.1
    LiLiQ-R-1.1 LiLiQ-Rplus-1.1 LPL-1.0 LPL-1.02 LPPL-1.2 LPPL-1.3a LPPL-1.3c MirOS MIT MIT-0 MIT-Modern-Variant
    Motosoto MPL-1.0 MPL-1.1 MPL-2.0 MPL-2.0-no-copyleft-exception MS-PL MS-RL MulanPSL-2.0 Multics NASA-1.3
    Naumen NCSA NGPL Nokia NOSL NPL-1.0 NPL-1.1 NPOSL-3.0 NTP Nunit OCLC-2.0 ODbL-1.0 OFL-1.0 OFL-1.1
    OFL-1.1-no-RFN OFL-1.1-RFN OGTSL OLDAP-2.3 OLDAP-2.7 OLDAP-2.8 OLFL-1.3 OpenSSL OSET-PL-2.1 OSL-1.0 OSL-1.1
    OSL-2.0 OSL-2.1 OSL-3.0 PHP-3.0 PHP-3.01 PostgreSQL Python-2.0 QPL-1.0 RPL-1.1 RPL-1.5 RPSL-1.0 RSCPL Ruby
    SGI-B-2.0 SimPL-2.0 SISSL Sleepycat SMLNJ SPL-1.0 StandardML-NJ UCL-1.0 Unicode-3.0 Unicode-DFS-2016
    Unlicense UPL-1.0 Vim VSL-1.0 W3C Watcom-1.0 WTFPL wxWindows X11 XFree86-1.1 xinetd Xnet YPL-1.1 Zend-2.0
    Zimbra-1.3 Zlib ZPL-2.0 ZPL-2.1
"""

# Open data by the tool's list, which has the Public Domain Dedication under the name ODC-PDDL-1.0.
_OPEN_DATA_IDS = """
    CC-BY-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-2.5-AU CC-BY-3.0 CC-BY-3.0-AT CC-BY-3.0-AU CC-BY-3.0-DE CC-BY-3.0-IGO
    CC-BY-3.0-NL CC-BY-3.0-US CC-BY-4.0 CC-BY-SA-1.0 CC-BY-SA-2.0 CC-BY-SA-2.0-UK CC-BY-SA-2.1-JP CC-BY-SA-2.5
    CC-BY-SA-3.0 CC-BY-SA-3.0-AT CC-BY-SA-4.0 CC0-1.0 CDLA-Permissive-1.0 CDLA-Permissive-2.0 CDLA-Sharing-1.0
    GFDL-1.3 ODbL-1.0 ODC-By-1.0 ODC-PDDL-1.0 OGL-Canada-2.0 OGL-UK-2.0 OGL-UK-3.0
"""

APPROVED, OPEN_DATA = frozenset(_APPROVED_IDS.split()), frozenset(_OPEN_DATA_IDS.split())
WHOLE_MODEL = frozenset({"OpenMDW-1.0"})
OPEN = APPROVED | OPEN_DATA | WHOLE_MODEL

_DOCUMENT = re.compile(r"CC-BY|CC0-|GFDL-|OGL-")
_DATA_ONLY = re.compile(r"CDLA-|OD")  # written for databases
_OTHER_WORKS = re.compile(r"CERN-OHL-|OFL-")  # hardware designs, fonts


def is_open(license_id: str) -> bool:
    """Return whether a license is open. The tool compares ids literally: no expressions, no other case."""
    return license_id in OPEN


def fitting_kinds(license_id: str) -> tuple[str, ...]:
    """Return the kinds of components (code, data, document) for which an open license was written."""
    if license_id in WHOLE_MODEL:
        return KINDS
    if _DOCUMENT.match(license_id):
        return (DATA, DOCUMENT) if license_id in OPEN_DATA else (DOCUMENT,)
    if _DATA_ONLY.match(license_id) and license_id in OPEN_DATA:
        return (DATA,)
    return () if _OTHER_WORKS.match(license_id) else (CODE,)


def suggestion(license_id: str) -> str:
    """Return the open license whose id is most similar to an id that is not open, as "; did you mean ...?", or ""."""
    by_lowercase = {known.lower(): known for known in OPEN}
    close = difflib.get_close_matches(license_id.strip().lower().replace(" ", "-"), by_lowercase, n=1, cutoff=0.85)
    return f"; did you mean {by_lowercase[close[0]]}?" if close else ""


# --------------------------------------------------------------------------------------------------------------- texts
_HOLDER, _YEAR = "{holder}", "{year}"
_FOLDER = Path(__file__).resolve().parent / "license_texts"
_GNU_VERSION = re.compile(r"-only|-or-later|\+")  # these ids share the text of the license
_MIN_WORDS = 25  # the shortest open licenses have about 60
_CC_PARTS = {"BY": "attribution", "SA": "sharealike"}
_GNU = {"": "gnu general", "A": "gnu affero general", "L": "gnu lesser general"}
# Phrases that the text of a license with such an id has, in lower case. The text of a similar license lacks one.
_PHRASES = (
    (r"CC0", ("cc0 1.0",)), (r"CC", ("creative commons",)), (r"Apache-2", ("apache license", "version 2.0")),
    (r"Apache", ("apache",)), (r"LGPL-2\.0", ("gnu library general public license version 2",)),
    (r"GFDL", ("gnu free documentation license",)), (r"MPL-1\.1", ("mozilla public license version 1.1",)),
    (r"MPL-2", ("mozilla public license version 2.0",)),
    (r"BSD-3", ("redistributions of source code", "endorse or promote")),
    (r"BSD", ("redistributions of source code",)), (r"CDLA-P", ("community data license agreement", "permissive")),
    (r"CDLA-S", ("community data license agreement", "sharing")), (r"ODbL", ("open database license",)),
    (r"ODC-By", ("open data commons attribution license",)), (r"ODC-PDDL", ("public domain dedication",)),
    (r"OpenMDW", ("openmdw",)), (r"OGL", ("open government",)), (r"EUPL", ("european union",)),
    (r"MIT", ("to any person obtaining a copy",)), (r"ISC", ("permission to use, copy, modify",)),
)  # fmt: skip


def available() -> list[str]:
    """Return the SPDX ids of the licenses whose texts this package has; -only and -or-later of some have them too."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def read_texts(ids: Iterable[str], files: Mapping[str, Path], holder: str | None) -> dict[str, str]:
    """Return the texts of licenses by SPDX id.

    Args:
        files: files with the texts of further licenses by id; they take precedence over those of this package.
        holder: the holder of the copyright, whom some texts name.

    Raises:
        ConfigError: a text that is missing, unreadable, of another license, or that needs a holder, or a file of a
            license that is not in use; with all problems.
    """
    texts, problems = {}, []
    wanted = sorted(set(ids))
    problems += [f"--license-text {name}=…: no --license has this id" for name in files if name not in wanted]
    for license_id in wanted:
        path = files.get(license_id, _FOLDER / f"{_GNU_VERSION.sub('', license_id)}.txt")
        if not path.is_file():
            problems.append(
                f"the text of {license_id} is missing: pass it with --license-text {license_id}=FILE; this package has "
                f"those of {', '.join(available())}"
            )
            continue
        texts[license_id] = text = path.read_text(encoding="utf-8", errors="replace")
        if not is_text_of(text, license_id):
            problems.append(f"{path}: does not hold the text of {license_id}")
        if _HOLDER in text and not holder:
            problems.append(f"--producer is missing: the text of {license_id} names the holder of the copyright")
    if problems:
        raise ConfigError(join_problems(problems))
    return texts


def write_texts(bundle: Path, texts: Mapping[str, str], holder: str, year: int) -> None:
    """Write LICENSES/{id}.txt, with the holder and the year of the copyright where the texts have a place for them."""
    for license_id, text in texts.items():
        content = text.replace(_HOLDER, holder).replace(_YEAR, str(year))
        storage.write_text(bundle / layout.LICENSES / f"{license_id}.txt", content)


def is_text_of(text: str, license_id: str) -> bool:
    """Return whether a text may be that of a license: long enough, and with the phrases of its name."""
    words = text.lower().split()
    joined = " ".join(words)
    return len(words) >= _MIN_WORDS and all(phrase in joined for phrase in _phrases(license_id))


def _phrases(license_id: str) -> tuple[str, ...]:
    if match := re.fullmatch(
        r"CC-(BY(?:-SA)?)-(\d\.\d)(?:-(?:AU|US|UK|IGO))?", license_id
    ):  # others are not in English
        return ("-".join(_CC_PARTS[part] for part in match[1].split("-")) + f" {match[2]}",)
    if (match := re.match(r"([AL]?)GPL-(\d(?:\.[1-9])?)", license_id)) and license_id != "LGPL-2.0":
        return (f"{_GNU[match[1]]} public license version {match[2]}",)
    return next((phrases for pattern, phrases in _PHRASES if re.match(pattern, license_id)), ())
