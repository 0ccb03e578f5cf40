//! Columns of numbers from tables of comma-separated values with a header row, compressed or not.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use flate2::read::MultiGzDecoder;

/// Most rows of a table: what is read stays in memory.
const ROWS_MAX: usize = 50_000_000;

/// Which column is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which<'a> {
    /// The one of this name.
    Named(&'a str),
    /// The first that has not this name.
    FirstBut(&'a str),
}

/// A column.
#[derive(Debug)]
pub(crate) struct Column {
    /// Its name.
    pub(crate) name: String,
    /// Its values, all finite.
    pub(crate) values: Vec<f64>,
}

/// Reads the columns `wanted` of the table in the file `path`; a name that ends with `.gz` is of a compressed one.
///
/// Errors name the file and, of a cell, its row (from 1, the header not counted), its line and its column.
pub(crate) fn read<const N: usize>(path: &Path, wanted: [Which<'_>; N]) -> anyhow::Result<[Column; N]> {
    let open = || -> anyhow::Result<Box<dyn Read>> {
        let file = BufReader::new(File::open(path)?);
        let is_compressed = path.extension().is_some_and(|extension| extension == "gz");
        Ok(if is_compressed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) })
    };
    open().and_then(|input| read_from(input, wanted)).with_context(|| path.display().to_string())
}

fn read_from<const N: usize>(input: impl Read, wanted: [Which<'_>; N]) -> anyhow::Result<[Column; N]> {
    let mut table = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(input);
    let header = table.headers().context("in the header row")?.clone();
    let mut places = [0; N];
    for (place, which) in places.iter_mut().zip(wanted) {
        *place = find(&header, which)?;
    }
    let mut columns = places.map(|place| Column { name: header[place].to_owned(), values: Vec::new() });
    let mut record = csv::StringRecord::new();
    let mut row = 0;
    while table.read_record(&mut record).with_context(|| format!("in row {}", row + 1))? {
        row += 1;
        ensure!(row <= ROWS_MAX, "there are more than {ROWS_MAX} rows");
        for (column, place) in columns.iter_mut().zip(places) {
            match record[place].parse() {
                Ok(value) if f64::is_finite(value) => column.values.push(value),
                _ => bail!(
                    "row {row} (line {}), column {:?}: expected a finite number, found {:?}",
                    record.position().map_or(0, csv::Position::line),
                    column.name,
                    &record[place]
                ),
            }
        }
    }
    Ok(columns)
}

/// The place of a column.
fn find(header: &csv::StringRecord, which: Which<'_>) -> anyhow::Result<usize> {
    let mut places = header.iter().enumerate().filter(|(_, name)| match which {
        Which::Named(wanted) => *name == wanted,
        Which::FirstBut(other) => *name != other,
    });
    match (which, places.next(), places.next()) {
        (Which::Named(wanted), Some(_), Some(_)) => bail!("there are several columns {wanted:?} in the header row"),
        (_, Some((place, _)), _) => Ok(place),
        (Which::Named(wanted), None, _) => bail!("there is no column {wanted:?} in the header row"),
        (Which::FirstBut(other), None, _) => bail!("there is no column beside {other:?} in the header row"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn refused(table: &str, wanted: &str) -> String {
        let error = read_from(table.as_bytes(), [Which::Named(wanted)]).expect_err("this table is refused");
        format!("{error:#}")
    }

    #[test]
    fn columns_are_found_by_name_and_by_place() {
        let table = "label, a,b\n0, 1.5,x\n1,-2e3,y\n";
        let [a, label] = read_from(table.as_bytes(), [Which::FirstBut("label"), Which::Named("label")]).unwrap();
        assert_eq!((a.name.as_str(), a.values), ("a", vec![1.5, -2000.0]));
        assert_eq!(label.values, [0.0, 1.0]);
    }

    #[test]
    fn errors_name_row_line_and_column() {
        let found = |cell| format!("row 2 (line 3), column \"score\": expected a finite number, found {cell:?}");
        assert_eq!(refused("t,score\n1,2\n1,NaN\n", "score"), found("NaN"));
        assert_eq!(refused("t,score\n1,2\n1,-inf\n", "score"), found("-inf"));
        assert_eq!(refused("t,score\n1,2\n1,\n", "score"), found(""));
        assert_eq!(refused("t,score\n1,2\n1,1e999\n", "score"), found("1e999"));
        assert!(refused("t,score\n1,2\n1\n", "score").starts_with("in row 2: "));
        assert_eq!(refused("t,score\n1,2\n", "scores"), "there is no column \"scores\" in the header row");
        assert_eq!(refused("a,a\n1,2\n", "a"), "there are several columns \"a\" in the header row");
        assert_eq!(refused("", "a"), "there is no column \"a\" in the header row");
    }

    #[test]
    fn a_compressed_table_is_read_and_a_torn_one_is_an_error_with_its_name() {
        let path = std::env::temp_dir().join(format!("lab-columns-{}.csv.gz", std::process::id()));
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(b"score\n1\n2\n").unwrap();
        let bytes = encoder.finish().unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let [scores] = read(&path, [Which::Named("score")]).unwrap();
        assert_eq!(scores.values, [1.0, 2.0]);
        std::fs::write(&path, &bytes[..bytes.len() - 6]).unwrap();
        let error = read(&path, [Which::Named("score")]).expect_err("the end is missing");
        std::fs::remove_file(&path).unwrap();
        assert!(format!("{error:#}").starts_with(&path.display().to_string()));
    }
}
