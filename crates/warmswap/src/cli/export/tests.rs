use super::*;
use crate::control::testing::{self, START, Served};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use warmswap_predict::Feature;

fn args(served: &Served, format: Format) -> Args {
    Args {
        name: "disk".to_owned(),
        from: None,
        to: None,
        last: None,
        grain: AskedGrain::Window,
        format,
        output: Some(served.dir.join("table")),
        store: None,
        control: Control { dir: Some(served.dir.clone()) },
    }
}

fn rows(served: &Served, args: &Args) -> Vec<String> {
    run(args).expect("it can be exported");
    let text = std::fs::read_to_string(served.dir.join("table")).expect("it was written");
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_running_device_is_exported_as_text() {
    let served = Served::start("export", None);
    served.note(Grain::Window, 0..5);
    served.note(Grain::Tick, 0..30);
    let lines = rows(&served, &args(&served, Format::Csv));
    assert_eq!(lines.len(), 6);
    let head: Vec<&str> = lines[0].split(',').collect();
    assert_eq!(head.len(), 5 + Feature::ALL.len());
    assert_eq!(head[..6], ["end_time", "grain", "number", "backend", "span_us", "arrivals_per_s"]);
    let row: Vec<&str> = lines[2].split(',').collect();
    assert_eq!(row.len(), head.len());
    assert_eq!(row[..6], ["2026-01-01T00:00:02.000000Z", "window", "1", "3", "1000000", "101"]);
    let cell = |name: &str| row[head.iter().position(|it| *it == name).expect("there is such a column")];
    assert_eq!((cell("latency_p99_us"), cell("cpu_cores")), ("12.5", ""));

    let some =
        Args { from: Some(START + 2_000_000_000), to: Some(START + 3_500_000_000), ..args(&served, Format::Csv) };
    assert_eq!(rows(&served, &some).len(), 1 + 2);
    let ticks = Args { grain: AskedGrain::Tick, ..args(&served, Format::Csv) };
    assert_eq!(rows(&served, &ticks).len(), 1 + 30);
    let error = run(&Args { name: "net".to_owned(), ..args(&served, Format::Csv) }).expect_err("there is none");
    assert_eq!(error.code, 4, "{}", error.message);
    let nothing = Args { from: Some(2), to: Some(1), ..args(&served, Format::Csv) };
    assert_eq!(run(&nothing).expect_err("nothing lies between").code, 2);
}

#[test]
fn a_file_that_was_left_is_exported_as_parquet_and_comes_back() {
    let mut served = Served::start("parquet", Some("store".as_ref()));
    served.note(Grain::Tick, 0..40);
    served.freeze("one", START + 50_000_000_000);
    served.note(Grain::Tick, 40..50);
    served.freeze("two", START + 60_000_000_000);
    served.note(Grain::Window, 0..20);
    let store = Some(served.dir.join("store"));
    // A thread of its own makes it.
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while !served.dir.join("store/disk.redb").exists() && std::time::Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
    let busy = run(&Args { store: store.clone(), ..args(&served, Format::Parquet) }).expect_err("it is open");
    assert!(busy.message.contains("in use by another process"), "{}", busy.message);
    served.end();
    for (grain, count) in [(AskedGrain::Window, 20), (AskedGrain::Tick, 50)] {
        run(&Args { store: store.clone(), grain, ..args(&served, Format::Parquet) }).expect("it can be exported");
        let file = File::open(served.dir.join("table")).expect("it was written");
        let reader = SerializedFileReader::new(file).expect("it is Parquet");
        let rows: Vec<Row> =
            reader.get_row_iter(None).expect("it has rows").map(|row| row.expect("it can be read")).collect();
        assert_eq!(rows.len(), count);
        for (row, number) in rows.iter().zip(0..) {
            let grain = if grain == AskedGrain::Tick { Grain::Tick } else { Grain::Window };
            let record = testing::record(grain, number);
            let fields: Vec<(&String, &Field)> = row.get_column_iter().collect();
            let micros = (record.end_unix_ns / 1_000).cast_signed();
            let first = [
                Field::TimestampMicros(micros),
                Field::Str(grain.name().to_owned()),
                Field::ULong(number),
                Field::ULong(3),
                Field::UInt(record.span_us),
            ];
            fields.iter().zip(&first).for_each(|((name, field), expected)| assert_eq!(*field, expected, "{name}"));
            for (feature, (name, field)) in Feature::ALL.into_iter().zip(&fields[5..]) {
                assert_eq!(name.as_str(), feature.name());
                let expected = record.get(feature).map_or(Field::Null, Field::Float);
                assert_eq!(**field, expected, "{name}");
            }
        }
    }
    let other =
        Args { name: "net".to_owned(), store: Some(served.dir.join("store/disk.redb")), ..args(&served, Format::Csv) };
    let error = run(&other).expect_err("it is another's");
    assert!(error.message.contains("is of device disk, not of net"), "{}", error.message);
}

/// Written where `WARMSWAP_PARQUET` says, for other programs to read.
#[test]
fn many_rows_are_several_groups() {
    let path = std::env::var_os("WARMSWAP_PARQUET").map(PathBuf::from);
    let out: Box<dyn Write + Send> = match &path {
        Some(path) => Box::new(File::create(path).expect("it can be written")),
        None => Box::new(std::io::sink()),
    };
    let mut table = Box::new(Parquet::new(out).expect("it can be begun"));
    for number in 0..20_000 {
        table.row(&testing::record(Grain::Window, number)).expect("it can be written");
    }
    table.end().expect("it can be ended");
}
