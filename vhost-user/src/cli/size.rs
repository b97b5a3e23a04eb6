//! Sizes as people write them.

/// Bytes from `512`, `64K`, `10G`, `1.5T`, with or without `i` or `iB`; all in powers of 1024.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; give bytes, or a number with K, M, G or T");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let unit = unit.trim().trim_end_matches('B').trim_end_matches('i');
    let shift = match unit {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let bytes = whole
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is too large"))?;
    if fraction.is_empty() {
        return Ok(bytes);
    }
    let digits = u32::try_from(fraction.len()).unwrap_or(u32::MAX);
    let part: u64 = fraction.parse().map_err(|_| wrong())?;
    let scale = 10_u64.checked_pow(digits).ok_or_else(wrong)?;
    let part = u128::from(part) * (1 << shift) / u128::from(scale);
    Ok(bytes + u64::try_from(part).map_err(|_| wrong())?)
}

/// Bytes for people.
pub fn show(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("64K"), Ok(65536));
        assert_eq!(parse("10GiB"), Ok(10 << 30));
        assert_eq!(parse("1.5T"), Ok(3 << 39));
        for wrong in ["", "G", "-1", "1X", "1.x", "99999999999T", "1..5G"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
